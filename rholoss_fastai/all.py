"Everything public: `from rholoss_fastai.all import *`"

from . import batch_loss_filter, interpret, irreducible, items, losses, one_pass, picks, record, rho_loss, scores, scoring, selective_backprop, selector
from .batch_loss_filter import *
from .interpret import *
from .irreducible import *
from .items import *
from .losses import *
from .one_pass import *
from .picks import *
from .record import *
from .rho_loss import *
from .scores import *
from .scoring import *
from .selective_backprop import *
from .selector import *

_modules = (losses, scores, picks, items, scoring, record, selector, batch_loss_filter, selective_backprop, irreducible, rho_loss, one_pass, interpret)
__all__ = [name for module in _modules for name in module.__all__]
