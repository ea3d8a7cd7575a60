"""A diffusion model in one file: it learns 8x8 digits in about a minute on two CPU cores.

It writes from_scratch.png: column k shows the digit k. It needs nothing of ddp. x0 is an image, eps
is normal noise, and x_t = alpha x0 + sigma eps is the image at time t, from 0 (clean) to 1 (noise).
"""

import sys

import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

STEPS = int(sys.argv[1]) if len(sys.argv) > 1 else 1200  # optimizer steps
WIDTH, EMBEDDING = 32, 128  # channels at 8x8; length of the vector that holds t and the label
torch.manual_seed(0)
images = torch.tensor(load_digits().images).float()[:, None] / 8 - 1  # (1797, 1, 8, 8) in [-1, 1]
labels = torch.tensor(load_digits().target)  # (1797,) from 0 to 9


# 1. The schedule: how much signal and how much noise there is at time t.
def alpha_sigma(t):  # (B,)
    angle = t[:, None, None, None] * torch.pi / 2  # (B, 1, 1, 1)
    return angle.cos(), angle.sin()  # the cosine schedule (Nichol & Dhariwal 2021, eq. 17, s = 0)


# 2. The forward diffusion step network: it adds noise. It has nothing to learn.
def q_sample(x0, t, eps):  # (B, 1, 8, 8), (B,), (B, 1, 8, 8)
    alpha, sigma = alpha_sigma(t)
    return alpha * x0 + sigma * eps  # a sample of q(x_t | x0) (Ho et al. 2020, eq. 4)


# 3. The reverse diffusion step network: a small U-Net that sees x_t, t and the label.
class Block(nn.Module):
    def __init__(self, width_in, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1, bias=False)  # BatchNorm has a bias
        self.norm1 = nn.BatchNorm2d(width)
        self.film = nn.Linear(EMBEDDING, 2 * width)  # t and label -> a scale and shift per channel
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)  # a block begins as its skip: Goyal et al. 2017
        self.skip = nn.Conv2d(width_in, width, 1)

    def forward(self, x, embedding):  # (B, width_in, H, W), (B, EMBEDDING)
        scale, shift = self.film(embedding)[:, :, None, None].chunk(2, dim=1)  # (B, width, 1, 1)
        h = self.norm1(self.conv1(x)) * (1 + scale) + shift  # BatchNorm would cancel a shift before
        h = self.norm2(self.conv2(F.dropout(F.leaky_relu(h), 0.05, self.training)))
        return F.leaky_relu(h + self.skip(x))  # (B, width, H, W)


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-1, 1.2, EMBEDDING // 2))
        self.label = nn.Embedding(10, EMBEDDING)
        self.embed = nn.Sequential(nn.Linear(EMBEDDING, EMBEDDING), nn.LeakyReLU())
        self.conv_in = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.down = Block(WIDTH, WIDTH)
        self.middle = nn.ModuleList([Block(WIDTH, 2 * WIDTH), Block(2 * WIDTH, 2 * WIDTH)])
        self.up = Block(3 * WIDTH, WIDTH)
        self.conv_out = nn.Conv2d(WIDTH, 1, 3, padding=1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):  # keep the variance: He et al. 2015
                nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, x_t, t, label):  # (B, 1, 8, 8), (B,), (B,)
        angle = t[:, None] * self.frequencies  # (B, EMBEDDING / 2)
        embedding = self.embed(torch.cat([angle.sin(), angle.cos()], dim=1) + self.label(label))
        skip = self.down(self.conv_in(x_t), embedding)  # (B, WIDTH, 8, 8)
        h = self.middle[0](F.avg_pool2d(skip, 2), embedding)  # (B, 2 WIDTH, 4, 4)
        h = F.interpolate(self.middle[1](h, embedding), scale_factor=2)  # (B, 2 WIDTH, 8, 8)
        h = self.up(torch.cat([h, skip], dim=1), embedding)  # (B, WIDTH, 8, 8)
        return self.conv_out(h)  # (B, 1, 8, 8), an estimate of v = alpha eps - sigma x0


# 4. Training: noise a batch, predict v, take a step, average the weights (EMA).
def noisy_batch(size):
    index = torch.randint(len(images), (size,))
    eps = torch.randn(size, 1, 8, 8)
    t = (torch.rand(1) + torch.arange(size) / size) % 1  # (size,), evenly spread over [0, 1)
    alpha, sigma = alpha_sigma(t)
    return q_sample(images[index], t, eps), t, labels[index], alpha * eps - sigma * images[index]


model = UNet()
ema = UNet().requires_grad_(False)
optimizer = torch.optim.AdamW(model.parameters())
for step in range(STEPS):
    x_t, t, label, v = noisy_batch(128)
    loss = F.mse_loss(model(x_t, t, label), v)  # = (1 + SNR) |x0_hat - x0|^2 (Salimans & Ho 2022)
    optimizer.zero_grad()
    loss.backward()
    optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / STEPS)
    optimizer.step()
    for average, weight in zip(ema.parameters(), model.parameters(), strict=True):
        average.lerp_(weight.detach(), max(0.005, 1 / (step + 1)))  # a plain mean at first
    if step % 100 == 0:
        print(f"step {step}, loss {loss.item():.3f}")

# 5. BatchNorm: the averaged weights need statistics of their own. Dropout stays off.
for module in ema.eval().modules():
    if isinstance(module, nn.BatchNorm2d):
        module.train().momentum = 1.0  # take the statistics of the next batch as they are
ema(*noisy_batch(4096)[:3])
ema.eval()

# 6. Sampling: from noise at t = 1 to images at t = 0 in 50 DDIM steps (Song et al. 2021, eq. 12).
x_t, label = torch.randn(60, 1, 8, 8), torch.arange(10).repeat(6)
times = torch.linspace(1, 0, 51)
alpha, sigma = alpha_sigma(times)
for i in range(50):
    x0_hat = (alpha[i] * x_t - sigma[i] * ema(x_t, times[i, None], label)).clamp(-1, 1)
    eps_hat = (x_t - alpha[i] * x0_hat) / sigma[i]
    x_t = alpha[i + 1] * x0_hat + sigma[i + 1] * eps_hat  # at the next, cleaner time
grid = F.pad(x_t, (1, 1, 1, 1), value=-1).reshape(6, 10, 10, 10).transpose(1, 2).reshape(60, 100)
pixels = ((grid + 1) * 127.5).byte().numpy()  # 6 rows of 10 digits
Image.fromarray(pixels).resize((1000, 600), Image.Resampling.BICUBIC).save("from_scratch.png")
