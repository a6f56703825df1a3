"""What runs the fused graph: ONNX Runtime (CPU, CUDA, its TensorRT provider), TensorRT, TensorRT-RTX, behind one small protocol.

protocol.py   Backend (probe, prepare, load) and Engine (infer)
chain.py      which of them, in which order, and why each of the others was skipped
onnx.py       ONNX Runtime
tensorrt.py   TensorRT and TensorRT-RTX: one class that is handed the module
execute.py    runs a plan; cuda.py: its memory, streams and graphs
compile.py    ONNX to plan; build.py: the process that does it, with limits; plans.py: the cache of what it built
"""
