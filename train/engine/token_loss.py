"""The loss of models that predict tokens and nothing else: encoders and encoder-decoders."""

from train.engine.stage import Batch, Loss


class TokenLoss(Loss):
    """The cross-entropy of the tokens that have a label, and the mean probability of the right ones."""

    def __call__(self, model, batch: Batch, weight: float) -> tuple[dict, dict]:
        """Return one micro-batch's share of the mean over all labels of the step."""
        output = model(**batch)
        return {"ce": output.loss_sum / weight}, {"conf": (-output.nll).exp().sum() / weight}

    def claims(self) -> dict:
        """The one term must reach every parameter that is trained."""
        return {"ce": lambda name: True}
