"""The folder that a vLLM server finds on its PYTHONPATH. It holds one module, which imports nothing of treegym."""
