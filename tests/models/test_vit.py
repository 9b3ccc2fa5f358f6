import torch
from helpers.tolerances import FLOAT32

from asapc.models.vit import VisionTransformer


def test_logits_have_one_row_an_image_and_do_not_depend_on_the_rest_of_the_batch() -> None:
    model = VisionTransformer(width=16, depth=1, heads=2, iterations=3).eval()
    images = torch.rand(5, 8, 8)
    with torch.no_grad():
        logits = model(images)
        alone = model(images[2:3])
    assert logits.shape == (5, 10)
    assert (logits[2:3] - alone).norm() <= FLOAT32 * alone.norm()


def test_without_iterations_attention_is_softmax() -> None:
    model = VisionTransformer(width=16, depth=1, heads=2, iterations=0).eval()
    attention = model.blocks[0].attention
    x = torch.randn(2, 64, 16)
    q, k, v = attention.qkv(x).view(2, 64, 3, 2, 8).permute(2, 0, 3, 1, 4).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 64, 16)
    torch.testing.assert_close(attention(x), attention.proj(expected))
