"""Build the portable ONNX graph of a checkpoint and lower it to what a runtime takes."""
