"""Published weights: folders as model hubs lay them out, and two-way tables of tensor names."""

from polymodal.models.weights.folder import HubConfigs, HubFolder
from polymodal.models.weights.names import SAME, TRANSPOSED, Change, NameTable, Reshape, Rule, Slice

__all__ = ["SAME", "TRANSPOSED", "Change", "HubConfigs", "HubFolder", "NameTable", "Reshape", "Rule", "Slice"]
