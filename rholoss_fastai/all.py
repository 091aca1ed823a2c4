"Everything that a user writes: `from rholoss_fastai.all import *`"

from importlib import import_module

_modules = '''losses scores picks rows loaders item_table candidates fit_callback scoring record side_models noise
irreducible ridge features probe label_noise il_source executors scorers delivery beside selector batch_loss_filter selective_backprop rho_loss
diverse_batch tokens importance pruning epoch_rules epoch_pruner rho_epochs groups row_weights just_train_twice one_pass budget interpret report compare'''.split()

__all__ = []
for _name in _modules:
    _module = import_module(f'.{_name}', __package__)
    globals().update({_o: getattr(_module, _o) for _o in _module.__all__})
    __all__ += _module.__all__
