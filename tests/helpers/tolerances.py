"""Every tolerance of the tests, in one place, with its reason. Relative to the norm of what is expected."""

FLOAT64 = 1e-10  # another order of the same operations in float64
FLOAT32 = 1e-5  # a float32 operator against its float64 reference
EXPORT = 1e-5  # ONNX Runtime against torch, both float32
LP = 1e-7  # a linear program's own tolerance
RIDGE = 1e-6  # a ridge fit with a penalty of 1e-10 against plain least squares
SOLVE = 1e-8  # float64 through a factorisation of covariances whose condition number is up to 1e6
LOGITS = 1e-4  # absolute: the largest difference of logits that a change of runtime or batch may make


def difference(actual, expected):
    """Norm of the error over the norm of what is expected; the norm of the error where that is zero."""
    actual, expected = actual.double(), expected.double()
    return ((actual - expected).norm() / (expected.norm() or 1.0)).item()
