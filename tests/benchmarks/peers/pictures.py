"""W3's data and model: pictures that are augmented as they are read, and a ResNet-18.

A file of its own, so that torchvision is no part of the other workloads."""

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.resnet import BasicBlock, ResNet

SIZE, CONTRAST = 64, 0.15


class Pictures(Dataset):
    """RGB images of 10 classes in 8 bits, a symmetric pattern per class, and noise."""

    def __init__(self, count, seed, *, augment):
        rng = torch.Generator().manual_seed(1)
        patterns = torch.randn(10, 3, 8, 8, generator=rng)
        patterns = nn.functional.interpolate(patterns + patterns.flip(-1), SIZE)
        rng = torch.Generator().manual_seed(seed)
        self.y = torch.randint(10, (count,), generator=rng)
        noise = torch.randn(count, 3, SIZE, SIZE, generator=rng)
        x = 128 + 40 * (noise + CONTRAST * patterns[self.y])
        self.x, self.augment = x.clamp(0, 255).to(torch.uint8), augment

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        """Flipped, shifted by up to 2 pixels, brighter or darker, as torch draws."""
        x = self.x[index] / 127.5 - 1
        if self.augment:
            x = x.flip(-1) if torch.rand(()) < 0.5 else x
            x = x.roll(torch.randint(-2, 3, (2,)).tolist(), (1, 2))
            x = x * (0.8 + 0.4 * torch.rand(()))
        return x, self.y[index]


class Network(ResNet):
    """ResNet-18 from the same start everywhere; NVFlare wants a class."""

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=10)


def adamw(model, lr):
    return torch.optim.AdamW(model.parameters(), lr, weight_decay=0.01)


def epoch(model, data, lr, batch_size, rng):
    """One epoch as anyone would write it for a Dataset; returns the number of steps."""
    optimizer = adamw(model, lr)
    loader = DataLoader(data, batch_size, shuffle=True, drop_last=True, generator=rng)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(rng.initial_seed() % 2**62)  # for the augmentation
        for x, y in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return len(loader)
