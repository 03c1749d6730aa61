"""The contract of every custom op: names, shapes, attributes, reference and ONNX function body."""
