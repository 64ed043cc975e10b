"""A small Swin-style image classifier with mixture-of-experts blocks, and its way into ONNX.

model.py      the model, in Flax
graph.py      the same model as ONNX nodes
export.py     the command: writes ONNX files, runs them in onnxruntime, prints the errors
"""
