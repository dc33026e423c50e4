"""What both apps must know: the task, and the method with its settings."""

from __future__ import annotations

from atoll.data.dataset import Info
from atoll.federated.codecs.quantise import Quantise
from atoll.federated.local.training import Training
from atoll.federated.methods.scaffold import scaffold
from atoll.models.mlp import MLP
from atoll.tasks.classification import Classification

INFO = Info(name="digits", kind="image", shape=(1, 8, 8), num_classes=10, unit=1 / 16)
TASK = Classification(INFO, MLP(hidden=(32,)))
METHOD = scaffold(training=Training(lr=0.1, epochs=2)).but(uplink=(Quantise(bits=8),))
