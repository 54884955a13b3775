"""Multi-scale dequantization: products and attention that read INT8 and MXFP4 as they are."""
