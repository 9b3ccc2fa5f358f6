import pytest
import torch

from asapc.ops.shapes import check_shape


def test_a_first_tensor_binds_the_sizes_of_its_axes():
    dims = {}
    check_shape(dims, torch.zeros(2, 3, 5), "B H N")
    assert dims == {"B": 2, "H": 3, "N": 5}


def test_tensors_that_share_their_named_axes_pass():
    dims = {}
    check_shape(dims, torch.zeros(2, 3, 5), "B H N")
    check_shape(dims, torch.zeros(5, 7), "N D")
    assert dims["D"] == 7


def test_an_axis_of_another_size_than_before_is_refused():
    dims = {"N": 5}
    with pytest.raises(ValueError, match=r"axis N of \(B N\) has size 4, expected 5"):
        check_shape(dims, torch.zeros(2, 4), "B N")


def test_an_axis_named_twice_must_have_one_size():
    check_shape({}, torch.zeros(3, 3), "N N")
    with pytest.raises(ValueError, match="axis N"):
        check_shape({}, torch.zeros(3, 4), "N N")


@pytest.mark.parametrize("shape", [(), (2,), (2, 3, 4)])
def test_another_number_of_axes_is_refused(shape):
    with pytest.raises(ValueError, match=r"expected a tensor of shape \(B N\)"):
        check_shape({}, torch.zeros(shape), "B N")


def test_a_scalar_has_the_empty_shape():
    dims = {}
    check_shape(dims, torch.zeros(()), "")
    assert dims == {}
