"""Training and evaluating a network, masked or not.

A mask is held by :meth:`lossprune.Mask.enforce` on the optimizer: the loop below knows nothing of
it.  :class:`SparseTraining` does the same work over the surviving weights alone, and
:class:`ConvolutionTraining` where there are convolutions, :class:`CompactedTraining` without the
channels that lead to no output, :class:`StackedTraining` for many networks together, and
:class:`SparseStack` the first and the last, on a GPU.

>>> import torch
>>> from lossprune.data import load
>>> from lossprune.networks import NETWORKS
>>> digits = load("digits", seed=1111)
>>> network = NETWORKS["MLP"](shape=digits.shape, generator=torch.Generator().manual_seed(1111))
>>> optimizer = make_optimizer(network, lr=0.01, l2=5e-4)
>>> generator = torch.Generator().manual_seed(1112)
>>> losses = [train_epoch(network, digits, optimizer, generator=generator) for _ in range(2)]
>>> evaluate(network, digits, digits.valid).error < 0.3
True
"""

from lossprune.training.choice import DenseTraining as DenseTraining
from lossprune.training.choice import Training as Training
from lossprune.training.choice import choose_stack as choose_stack
from lossprune.training.choice import choose_training as choose_training
from lossprune.training.choice import dense_training as dense_training
from lossprune.training.compacted import CompactedTraining as CompactedTraining
from lossprune.training.convolution.training import ConvolutionTraining as ConvolutionTraining
from lossprune.training.evaluation import Evaluation as Evaluation
from lossprune.training.evaluation import evaluate as evaluate
from lossprune.training.loop import DivergedError as DivergedError
from lossprune.training.loop import make_optimizer as make_optimizer
from lossprune.training.loop import train_epoch as train_epoch
from lossprune.training.perceptron.stack import SparseStack as SparseStack
from lossprune.training.perceptron.structure import NotSparseError as NotSparseError
from lossprune.training.perceptron.training import SparseTraining as SparseTraining
from lossprune.training.precision import Forward as Forward
from lossprune.training.stacked.epoch import TogetherTraining as TogetherTraining
from lossprune.training.stacked.stackable import NotStackableError as NotStackableError
from lossprune.training.stacked.stackable import bytes_per_member as bytes_per_member
from lossprune.training.stacked.stackable import worthwhile as worthwhile
from lossprune.training.stacked.training import StackedTraining as StackedTraining
