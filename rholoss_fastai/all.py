"Everything public: `from rholoss_fastai.all import *`"

from . import (
    batch_loss_filter,
    budget,
    executors,
    importance,
    interpret,
    irreducible,
    items,
    losses,
    noise,
    one_pass,
    picks,
    pruning,
    record,
    report,
    rho_loss,
    scores,
    scoring,
    select,
    selective_backprop,
    selector,
    side_models,
)
from . import compare as compare_module # `compare` is its function
from . import just_train_twice as just_train_twice_module # `just_train_twice` is its function
from .batch_loss_filter import *
from .budget import *
from .compare import *
from .executors import *
from .importance import *
from .interpret import *
from .irreducible import *
from .items import *
from .just_train_twice import *
from .losses import *
from .noise import *
from .one_pass import *
from .picks import *
from .pruning import *
from .record import *
from .report import *
from .rho_loss import *
from .scores import *
from .scoring import *
from .select import *
from .selective_backprop import *
from .selector import *
from .side_models import *

_modules = (losses, scores, picks, items, scoring, record, side_models, noise, selector, batch_loss_filter, selective_backprop, select, irreducible,
            rho_loss, importance, pruning, just_train_twice_module, one_pass, interpret, report, executors, budget, compare_module)
__all__ = [name for module in _modules for name in module.__all__]
