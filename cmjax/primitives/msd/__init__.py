"""Multi-scale dequantisation: products and attention that read INT8 and MXFP4 as they are."""
