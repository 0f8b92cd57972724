"Image files to batches of bytes: sources, listing, decoding, loading, augmentation, normalisation."
