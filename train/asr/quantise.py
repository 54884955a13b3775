"""Switch a trained network to integers: calibration, and what it decided."""


def calibrate(model, batches, framing, precision):
    raise NotImplementedError


def saved_plans(model):
    return {}


def restore_plans(model, plans):
    pass
