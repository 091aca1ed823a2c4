"What a user writes: `from rholoss_fastai.all import *`; any other public name is there when it is asked for by name"

from importlib import import_module

_modules = '''checks nested loss_tasks loss_checks losses scores picks rows loaders item_table candidates
fit_callback scoring record executors side_models noise irreducible ridge features learnable held_out probe
label_noise il_source teacher scorers delivery selection_checks beside selector batch_loss_filter
selective_backprop rho_loss tokens diverse_batch reducr importance pruning epoch_rules epoch_pruner rho_epochs
trajectories groups row_weights just_train_twice divergence hypergradient one_pass budget interpret report
comparison compare'''.split()
_loaded = [import_module(f'.{_name}', __package__) for _name in _modules] # each patches its one-liners onto `Learner`

__all__ = '''ItemLosses item_losses SCORES PICKS Pick RankedPick Selection TopFraction Uniform LossShare
PercentileSample RankSample Boltzmann ImportanceSample PerClass ThenUniform DivBS candidate_input BatchSelector
BatchLossFilter SelectiveBackprop RhoLossCallback SeparateForward SharedForward LossMemory When add_selector
track_rows restrict_rows scoring_loader fingerprint ItemTable SelectionRecord SelectionReport IrreducibleLosses
irreducible_losses fit_irreducible crossfit_irreducible learner_copies probe_irreducible probe_predictions label_noise
il_source DatasetScores dataset_scores el2n grand ForgettingTracker score_dataset prune EpochRule EpochInfo InfoBatch
RandomSubset SeTa IES Reducible EpochPruner row_groups WorstGroup RowWeights GroupDRO weighted_loaders misclassified
error_set just_train_twice tune_just_train_twice OnePassTuner LossHistory ByHistory TeacherIL redraw_labels
relabel noisy_labels add_noise noisy_inputs relevant_classes long_tail compare Comparison'''.split()

def __getattr__(name):
    for module in _loaded:
        if name in module.__all__: return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

# not left to `__getattr__`: some modules are called as their function is
globals().update({_name: __getattr__(_name) for _name in __all__})
