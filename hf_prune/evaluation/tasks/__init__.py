"""What a model is for: classifying, labelling, answering, writing, modelling language, or comparing texts.

A task knows where its data is and which of it calibration may see; how texts become batches for calibration, a polish
or a training; and how models of its kind are checked, scored and compared. All classes have the same methods, so their
users need not ask which one they have. A new task is a file here with a class like these, and a place in ``Task``.
"""

from hf_prune.evaluation.tasks.classification import ClassificationTask
from hf_prune.evaluation.tasks.examples import ExampleTask
from hf_prune.evaluation.tasks.language_modeling import LanguageModelingTask
from hf_prune.evaluation.tasks.raw import RawTask
from hf_prune.evaluation.tasks.sentences import SentenceTask

Task = ClassificationTask | LanguageModelingTask | SentenceTask | ExampleTask | RawTask
