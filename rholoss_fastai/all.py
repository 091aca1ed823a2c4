"Everything public: `from rholoss_fastai.all import *`"

from . import batch_loss_filter, interpret, irreducible, items, losses, noise, picks, record, rho_loss, scores, scoring, selective_backprop, selector
from .batch_loss_filter import *
from .interpret import *
from .irreducible import *
from .items import *
from .losses import *
from .noise import *
from .picks import *
from .record import *
from .rho_loss import *
from .scores import *
from .scoring import *
from .selective_backprop import *
from .selector import *

_modules = (losses, scores, picks, items, scoring, record, noise, selector, batch_loss_filter, selective_backprop, irreducible, rho_loss, interpret)
__all__ = [name for module in _modules for name in module.__all__]
