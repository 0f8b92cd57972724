"The same learner on many devices: communication, shards of a batch, workers, and the gang that they form."
