"""Draw the two losses of a generator, and the gradients they give, to figures/gan_losses.png.

  python tests/draw_gan_losses.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import common  # noqa: E402
import gan  # noqa: E402


def main():
    logits = torch.linspace(-6, 6, 200, requires_grad=True)
    figure, ((left, right),) = common.new_figure(
        1, 2, (9, 3.6), "What the generator minimizes, and what pulls it")
    for name, losses in (("non-saturating, -log D", F.softplus(-logits)),
                         ("minimax, log(1 - D)", -F.softplus(logits))):
        gradient, = torch.autograd.grad(losses.sum(), logits)
        left.plot(logits.detach(), losses.detach(), label=name)
        right.plot(logits.detach(), -gradient, label=name)
    assert torch.isclose(gan.generator_loss(logits), F.softplus(-logits).mean())
    left.set(xlabel="logit of a generated image", ylabel="loss")
    right.set(xlabel="logit of a generated image", ylabel="pull toward a higher logit")
    for axis in left, right:
        axis.axvspan(-6, -2, color="0.92", zorder=0)
        axis.grid(alpha=0.3)
    left.legend(frameon=False)
    common.save_figure(ROOT / "figures" / "gan_losses.png", figure)


if __name__ == "__main__":
    main()
