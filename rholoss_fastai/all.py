"Everything public: `from rholoss_fastai.all import *`"

from . import (
    batch_loss_filter,
    checks,
    features,
    fit_callback,
    importance,
    interpret,
    irreducible,
    item_table,
    loaders,
    losses,
    nested,
    noise,
    one_pass,
    picks,
    probe,
    pruning,
    record,
    report,
    rho_loss,
    ridge,
    rows,
    scores,
    scoring,
    select,
    selective_backprop,
    selector,
    side_models,
)
from . import just_train_twice as just_train_twice_module # `just_train_twice` is its function
from . import label_noise as label_noise_module # `label_noise` is its function
from .batch_loss_filter import *
from .checks import *
from .features import *
from .fit_callback import *
from .importance import *
from .interpret import *
from .irreducible import *
from .item_table import *
from .loaders import *
from .just_train_twice import *
from .label_noise import *
from .losses import *
from .nested import *
from .noise import *
from .one_pass import *
from .picks import *
from .probe import *
from .pruning import *
from .record import *
from .report import *
from .rho_loss import *
from .ridge import *
from .rows import *
from .scores import *
from .scoring import *
from .select import *
from .selective_backprop import *
from .selector import *
from .side_models import *

_modules = (checks, nested, losses, scores, picks, rows, loaders, item_table, scoring, fit_callback, record,
            side_models, noise, selector, batch_loss_filter, selective_backprop, select, irreducible,
            ridge, features, probe, label_noise_module, rho_loss, importance, pruning, just_train_twice_module, one_pass, interpret, report)
__all__ = [name for module in _modules for name in module.__all__]
