"""A published training example of MindSpeed MM as a configuration of ours.

>>> from mm_finetune.mindspeed import import_example
>>> imported = import_example("data_7b.json", "model_7b.json", "finetune_qwen2_5_vl_7b.sh", beside="train.yaml")
>>> print(imported.yaml)

`script` reads the shell, `tables` knows what every flag and field means here, `example` puts both together.
"""

from mm_finetune.mindspeed.example import Imported, import_example
from mm_finetune.mindspeed.script import training_arguments
from mm_finetune.mindspeed.tables import Remark

__all__ = ["import_example", "Imported", "Remark", "training_arguments"]
