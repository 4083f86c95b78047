"""The Lightning modules, one for each kind of model, and the protocols of what commands ask of them."""
