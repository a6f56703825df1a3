"""What runs the fused graph: ONNX Runtime (CPU, CUDA, its TensorRT provider), TensorRT, TensorRT-RTX, behind one small protocol.

protocol.py   Backend (probe, prepare, load) and Engine (infer)
chain.py      which of them, in which order, and why each of the others was skipped
onnx.py       ONNX Runtime
tensorrt.py   TensorRT and TensorRT-RTX: one class that is handed the module; cuda.py: its buffers, streams and graphs
plans.py      the cache of built engines; build.py: the process that builds one
"""
