"""A trainer for nnU-Net that keeps about half as much for the backward pass.

    export nnUNet_extTrainer=FOLDER_OF_THIS_FILE
    nnUNetv2_train DATASET 3d_fullres 0 -tr nnUNetTrainerHalfMemory

Networks, checkpoints and results are those of nnUNetTrainer. It does not use torch.compile, which plans memory itself.
"""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

import iabn_hub


class nnUNetTrainerHalfMemory(nnUNetTrainer):
    def initialize(self):
        super().initialize()
        iabn_hub.convert(getattr(self.network, "module", self.network))  # within DistributedDataParallel

    def _do_i_compile(self):
        return False
