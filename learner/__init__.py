"Trains in one process: modules, losses, an optimizer, the loop and its callbacks, and the data they eat."
