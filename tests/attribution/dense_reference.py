"""Attribution by an explicit Jacobian: the transformers model in float64, with what is constant detached by hand.

Nothing of saejax's decoder is used. Norms are rewritten with detached factors, softmax is detached, and each MLP's
output is detached but for the skip path; a leaf that is zero is added to it. The gradients of a target with respect to
these leaves and to the stream entering layer 0 are its row.
"""

from unittest import mock

import numpy as np
import torch
from torch_sites import MODULES
from transformers import AutoModelForCausalLM


def arrays_of(transcoder) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(array, np.float64)) for name, array in transcoder.arrays.items()}


def encode(config, w, x_TxD):
    pre_TxF = x_TxD @ w["W_enc_DxF"] + w["b_enc_F"]
    if config.kind == "jumprelu":
        return torch.where(pre_TxF > w["threshold_F"], pre_TxF, 0)
    if config.kind == "topk":
        return torch.where(pre_TxF >= pre_TxF.topk(config.k).values[:, -1:], pre_TxF.relu(), 0)
    return pre_TxF.relu()


class Dense:
    """The local replacement model of a prompt.

    Args:
      folder: of the model.
      transcoders: one for each layer.
      ids: of the prompt.
      normed: whether transcoders read before the gain of the norm.
      writes: of each layer's features, what they write to this layer and to each later one [F, L - layer, D]; None:
        the decoder to this layer alone.
      stream: whether transcoders read the stream before the norm.
    """

    def __init__(self, folder, transcoders, ids, normed, writes=None, stream=False):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        self.model.eval().requires_grad_(False)
        self.w, self.configs = [arrays_of(t) for t in transcoders], [t.config for t in transcoders]
        self.family, self.normed, self.stream = self.model.config.model_type, normed, stream
        own = [w["W_dec_FxD"][:, None].numpy() for w in self.w] if writes is None else writes
        self.writes = [torch.from_numpy(np.asarray(array, np.float64)) for array in own]
        self.reads, self.acts, self.errors, self.leaves, self._plain = [], [], [], [], {}
        shape = (len(ids), self.model.config.hidden_size)
        self.leaves = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in transcoders]
        self._hook()
        softmax = torch.nn.functional.softmax
        with mock.patch("torch.nn.functional.softmax", lambda x, dim, dtype=None: softmax(x, dim).detach()):
            self.logits_V = self.model(torch.as_tensor(np.array(ids)[None]), use_cache=False).logits[0, -1]

    def _hook(self):
        where = MODULES[self.family]
        for name, module in self.model.named_modules():
            if type(module).__name__.endswith(("RMSNorm", "LayerNorm")):
                module.forward = self._norm(name, module)
        layers = self.model.get_submodule(where.layers)
        layers[0].register_forward_pre_hook(self._start)
        for index, layer in enumerate(layers):
            layer.get_submodule(where.mlp).register_forward_pre_hook(self._read(index))
            layer.get_submodule(where.mlp_out).register_forward_hook(self._write(index))
        self.head = self.model.get_output_embeddings()
        self.head.register_forward_pre_hook(lambda module, args: setattr(self, "final_D", args[0][0, -1]))

    def _norm(self, name, module):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        gain = module.weight + (1 if self.family.startswith("gemma") else 0)

        def forward(x):
            centred = x - x.mean(-1, keepdim=True) if isinstance(module, torch.nn.LayerNorm) else x
            self._plain["stream"] = x
            plain = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps).detach()
            self._plain["last"] = plain
            bias = getattr(module, "bias", None)
            return plain * gain if bias is None else plain * gain + bias

        return forward

    def _start(self, module, args):
        self.tokens_TxD = args[0].detach().requires_grad_()
        return (self.tokens_TxD, *args[1:])

    def _read(self, index):
        # Where transcoders read before the gain, the norm right before the MLP is the last one that ran.
        name = "stream" if self.stream else "last" if self.normed else None
        return lambda module, args: self.reads.append((self._plain[name] if name else args[0])[0])

    def _write(self, index):
        def hook(module, args, output):
            read_TxD, w = self.reads[index], self.w[index]
            skip_TxD = read_TxD @ w["W_skip_DxD"] if "W_skip_DxD" in w else torch.zeros_like(read_TxD)
            acts_TxF = encode(self.configs[index], w, read_TxD).detach()
            acts_TxF[0] = 0
            self.acts.append(acts_TxF)
            written_TxD = sum(self.acts[layer] @ write_FxD for layer, write_FxD in self._into(index))
            error_TxD = (output[0] - (written_TxD + w["b_dec_D"] + skip_TxD)).detach()
            error_TxD[0] = 0
            self.errors.append(error_TxD)
            return skip_TxD[None] + (output - skip_TxD).detach() + self.leaves[index]

        return hook

    def _into(self, index):
        """The layers that write to one, and what their features write there."""
        reach = [(layer, index - layer) for layer in range(index + 1)]
        return [(layer, self.writes[layer][:, n]) for layer, n in reach if n < self.writes[layer].shape[1]]

    @property
    def active(self) -> np.ndarray:
        """Layer, position and feature of the active features, in order, [A, 3]."""
        found = [np.argwhere(acts.numpy() != 0) for acts in self.acts]
        return np.concatenate([np.insert(part, 0, layer, axis=1) for layer, part in enumerate(found)])

    def feature_row(self, layer, position, feature) -> np.ndarray:
        return self._row(self.reads[layer][position] @ self.w[layer]["W_enc_DxF"][:, feature])

    def logit_row(self, token) -> np.ndarray:
        weight = self.head.weight
        return self._row(self.final_D @ (weight[token] - weight.mean(0)))

    def _row(self, target) -> np.ndarray:
        """What active features, errors and tokens contribute to a target, in this order."""
        leaves = [*self.leaves, self.tokens_TxD]
        found = torch.autograd.grad(target, leaves, retain_graph=True, allow_unused=True)
        *grads, of_tokens = (
            torch.zeros_like(x) if g is None else g[-len(self.reads[0]) :] for g, x in zip(found, leaves)
        )
        features = [
            self.acts[l][t, f] * sum(write_D @ grads[l + n][t] for n, write_D in enumerate(self.writes[l][f]))
            for l, t, f in self.active
        ]
        errors = torch.stack([(error * grad).sum(-1) for error, grad in zip(self.errors, grads)])
        tokens = (self.tokens_TxD * of_tokens).sum(-1)
        return torch.cat([torch.stack(features), errors.reshape(-1), tokens.reshape(-1)]).detach().numpy()
