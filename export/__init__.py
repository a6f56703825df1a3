"""From what training made to what an edge installs: one fused ONNX graph, verified, in a bundle."""
