__version__ = "0.9.0"

import warnings as _warnings

# fastai's import calls torch.jit.script, and torch warns of it: nothing that a user of sdip could change
_warnings.filterwarnings('ignore', message='.torch.jit.script', category=FutureWarning)
