"""Rotation of the residual stream, folded into the weights: QuaRot (arXiv 2404.00456).

An RMS norm without weights gives the rotated values for a rotated input. So its weights are moved
into the linears that read it, the embedding is multiplied by an orthogonal Q from the right, what
reads the stream by Q as well, and what writes to it by Q^T from the left: the model computes the
same function, and what was in a few channels is spread over all of them. The same is done inside
each head, between the values and the projection that reads them. Nothing is left to do when the
model runs.
"""

from mlcawq.quantize.rotation.model import rotated_model
from mlcawq.quantize.rotation.plan import rotation_problems

__all__ = ["rotated_model", "rotation_problems"]
