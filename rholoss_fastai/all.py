"Everything public: `from rholoss_fastai.all import *`"

from . import interpret, irreducible, items, losses, picks, record, rho_loss, scores, scoring, selector
from .interpret import *
from .irreducible import *
from .items import *
from .losses import *
from .picks import *
from .record import *
from .rho_loss import *
from .scores import *
from .scoring import *
from .selector import *

__all__ = [name for module in (losses, scores, picks, items, scoring, record, selector, irreducible, rho_loss, interpret) for name in module.__all__]
