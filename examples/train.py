"""Train a network in a loop of your own, in mixed precision."""

import torch
from torch.nn import functional as F

import iabn_hub

torch.manual_seed(0)
model = iabn_hub.create_model("test_resnet_iabn", num_classes=2).train()
optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)

# Dark and bright images.
labels = torch.arange(16) % 2
images = torch.randn(16, 3, 32, 32) + 2 * labels.view(-1, 1, 1, 1).float() - 1

for step in range(10):
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images)
    loss = F.cross_entropy(logits.float(), labels)
    loss.backward()
    optimizer.step()
    print(f"step {step}  loss {loss.item():.3f}")
