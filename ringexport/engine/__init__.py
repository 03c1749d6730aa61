"""Turn an ONNX file into a TensorRT engine; this layer knows no model and imports no framework."""
