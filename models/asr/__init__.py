"""Speech recognition: features, ConvDFSMN and Wav2letter, CTC and its decoding, error rates."""
