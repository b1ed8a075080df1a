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

from saejax.models import source


def arrays_of(transcoder) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.asarray(array, np.float64)) for name, array in transcoder.arrays.items()}


def encode(config, w, x_TxD):
    pre_TxF = x_TxD @ w["W_enc_DxF"] + w["b_enc_F"]
    if config.kind == "jumprelu":
        return torch.where(pre_TxF > w["threshold_F"], pre_TxF, 0)
    if config.kind == "topk":
        return torch.where(pre_TxF >= pre_TxF.topk(config.k).values[:, -1:], pre_TxF.relu(), 0)
    return pre_TxF.relu()


def writes_of(transcoders, writes=None) -> list[torch.Tensor]:
    """What the features of each layer write to it and to each later layer, [F, L - layer, D]."""
    if writes is None:
        writes = [np.asarray(transcoder.W_dec_FxD[...])[:, None] for transcoder in transcoders]
    return [torch.from_numpy(np.asarray(array, np.float64)) for array in writes]


def added(writes, acts, layer):
    """What features with the activations ``acts`` [T, F] of each layer add to a layer, [T, D]."""
    reach = [below for below in range(layer + 1) if layer - below < writes[below].shape[1]]
    return sum(acts[below] @ writes[below][:, layer - below] for below in reach)


class EditedModel:
    """The transformers model in float64, whose MLPs add what features of transcoders write more when they are set."""

    def __init__(self, lm, transcoders, writes=None):
        self.model = source.load_torch_model(lm.source, "float32").double()
        self.w, self.configs = [arrays_of(t) for t in transcoders], [t.config for t in transcoders]
        self.writes = writes_of(transcoders, writes)

    def run(self, ids, changes=(), entering=None) -> tuple[np.ndarray, list[np.ndarray]]:
        """The logits of the last token [V] and the stream entering each layer, with all ``changes`` made.

        ``entering``: a layer, and the stream [T, D] that enters it instead.
        """
        streams, moved, handles = [], [], []

        def enter(module, inputs):
            if entering and entering[0] == len(streams):
                inputs = (torch.from_numpy(entering[1])[None], *inputs[1:])
            streams.append(inputs[0][0].numpy())
            return inputs

        def write(module, inputs, output):
            layer = len(moved)
            acts_TxF = encode(self.configs[layer], self.w[layer], inputs[0][0])
            acts_TxF[0] = 0
            moved.append(torch.zeros_like(acts_TxF))
            for _, position, feature, value in (change for change in changes if change.layer == layer):
                moved[-1][position, feature] = value - acts_TxF[position, feature]
            return output + added(self.writes, moved, layer)

        for block in self.model.model.layers:
            handles += [block.mlp.register_forward_hook(write), block.register_forward_pre_hook(enter)]
        with torch.no_grad():
            logits_V = self.model(torch.tensor([list(ids)])).logits[0, -1].numpy()
        for handle in handles:
            handle.remove()
        return logits_V, streams


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
        self.writes = writes_of(transcoders, writes)
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
            written_TxD = added(self.writes, self.acts, index) + w["b_dec_D"] + skip_TxD
            error_TxD = (output[0] - written_TxD).detach()
            error_TxD[0] = 0
            self.errors.append(error_TxD)
            return skip_TxD[None] + (output - skip_TxD).detach() + self.leaves[index]

        return hook

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
