"""Private models of a user's own: two that fit together, and some that are refused."""

from torch import nn


class Narrow(nn.Module):
    """A perceptron with 24 features."""

    def __init__(self, picture, classes, hidden=16, width=24):
        super().__init__()
        channels, height, breadth = picture
        self.body = nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * breadth, hidden), nn.ReLU(), nn.Linear(hidden, width), nn.ReLU()
        )
        self.classifier = nn.Linear(width, classes)

    def features(self, pictures):
        return self.body(pictures)


class Wide(Narrow):
    def __init__(self, picture, classes):
        super().__init__(picture, classes, hidden=40)


class Thin(Narrow):
    def __init__(self, picture, classes):
        super().__init__(picture, classes, width=10)


class Normalised(Narrow):
    def __init__(self, picture, classes):
        super().__init__(picture, classes)
        self.norm = nn.BatchNorm1d(24)


class Deaf(nn.Module):
    def __init__(self, picture, classes):
        super().__init__()
        self.body = nn.Linear(1, 1)


class Greedy(Narrow):
    def __init__(self, picture, classes):
        super().__init__(picture, classes + 1)


class Confused(Narrow):
    def features(self, pictures):
        return self.body(pictures[:, :, 1:])


def broken(picture):
    """Takes no number of classes."""


class BagOfWords(nn.Module):
    """A mean of word vectors with 24 features, for texts."""

    def __init__(self, vocabulary, classes):
        super().__init__()
        self.words = nn.Embedding(vocabulary, 24)
        self.classifier = nn.Linear(24, classes)

    def features(self, texts):
        real = texts["attention_mask"][..., None]
        return (self.words(texts["input_ids"]) * real).sum(1) / real.sum(1)
