"""TensorRT engines: TensorRT proper where there is a GPU, TensorRT-RTX ahead of time where there is none."""
