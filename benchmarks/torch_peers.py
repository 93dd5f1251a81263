"""Meta-steps in PyTorch, eager and compiled, with four libraries for MAML, as careful users write them.

Every peer has a function `backward(tasks)`, which adds the mean meta-gradient over `tasks` to the `.grad` of
the network's parameters. The peers share a network with the same parameter values as ours, the same batch
statistics, and a fused Adam. Each subclass of `Peer` implements one kind of rows.
"""

import importlib
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from rows import SequenceRow
from torch import nn


class ExplicitBatchNorm(nn.BatchNorm2d):
    """Batch normalisation as tensor operations.

    torch.func needs it because under `torch.func.vmap` torch 2.13 computes a wrong second derivative of
    `F.batch_norm` with respect to its input, in float64 too. Without vmap the derivative is right.
    """

    def forward(self, x):
        var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        gain = self.weight * torch.rsqrt(var + self.eps)
        return x * gain[:, None, None] + (self.bias - mean * gain)[:, None, None]


class Block(nn.Module):
    """3×3 convolution with bias, batch normalisation by the batch's own statistics, pooling, ReLU."""

    def __init__(self, row, channels, filters, norm):
        super().__init__()
        stride, padding = 2 if row.strided else 1, 1 if row.padding == "SAME" else 0
        self.conv = nn.Conv2d(channels, filters, 3, stride, padding)
        self.norm = norm(filters, eps=1e-3, track_running_stats=False)
        self.strided = row.strided

    def forward(self, x):
        x = self.norm(self.conv(x))
        # Before the ReLU, as ours does: the two commute, and a quarter of the pixels are left.
        return F.relu(x if self.strided else F.max_pool2d(x, 2))


class Net(nn.Module):
    """`StridedConv4` (spatial mean) or `Conv4` (max-pooled, flattened) with a linear head."""

    def __init__(self, row, norm=nn.BatchNorm2d):
        super().__init__()
        channels = [row.image[2]] + row.blocks * [row.filters]
        self.blocks = nn.Sequential(*(Block(row, c, o, norm) for c, o in itertools.pairwise(channels)))
        self.strided = row.strided
        self.head = nn.Linear(row.features, row.ways) if row.inner_steps else nn.Identity()

    def forward(self, x):
        x = self.blocks(x)
        return self.head(x.mean((2, 3)) if self.strided else x.flatten(1))


def task_loss(net, row, order):
    """Return the loss of one task by torch.func, `(params, xs, ys, xq, yq) -> scalar`."""

    def loss(params, x, y):
        return F.cross_entropy(torch.func.functional_call(net, params, (x,)), y)

    def maml(params, xs, ys, xq, yq):
        for _ in range(row.inner_steps):
            grads = torch.func.grad(loss)(params, xs, ys)
            if order == "first":
                grads = {name: g.detach() for name, g in grads.items()}
            params = {name: p - row.inner_lr * grads[name] for name, p in params.items()}
        return loss(params, xq, yq)

    def prototypical(params, xs, ys, xq, yq):
        del ys
        return prototypical_loss(torch.func.functional_call(net, params, (torch.cat([xs, xq]),)), yq, row)

    return maml if row.inner_steps else prototypical


def prototypical_loss(z, yq, row):
    """Return the loss of prototypical networks on the features of support and queries in one batch."""
    support = row.ways * row.shots
    means, queries = z[:support].unflatten(0, (row.ways, row.shots)).mean(1), z[support:]
    # ‖query‖² is the same for all classes and cancels in the softmax.
    logits = 2 * queries @ means.T - means.square().sum(1)
    return F.cross_entropy(logits, yq)


def mean_task_gradient(net, row, order):
    """Return the gradient of the mean loss by `vmap` over tasks, `(params, xs, ys, xq, yq) -> dict`."""
    over_tasks = torch.func.vmap(task_loss(net, row, order), (None, 0, 0, 0, 0))
    return torch.func.grad(lambda params, *tasks: over_tasks(params, *tasks).mean())


def compiled(function):
    """Return a function or module compiled as one graph for the shapes that it gets."""
    # Peers share code, and each has a cache of its own: otherwise the shapes and types that another peer
    # compiled would count against its limit of compilations.
    return torch.compile(function, fullgraph=True, dynamic=False, isolate_recompiles=True)


def detached(net):
    return {name: p.detach() for name, p in net.named_parameters()}


def with_func(net, row, order):
    """Return the backward pass of torch.func: `vmap` over tasks of `grad` through `functional_call`."""
    return _all_at_once(net, mean_task_gradient(net, row, order))


def with_compiled_vmap(net, row, order):
    """Return the backward pass of torch.compile on the gradient of `vmap` over tasks."""
    return _all_at_once(net, compiled(mean_task_gradient(net, row, order)))


def _all_at_once(net, gradient):
    def backward(tasks):
        grads = gradient(detached(net), *tasks)
        for name, p in net.named_parameters():
            p.grad = grads[name]

    return backward


def with_compiled_loop(net, row, order):
    """Return the backward pass of torch.compile on the gradient of one task: a loop over tasks."""
    gradient = compiled(torch.func.grad(task_loss(net, row, order)))

    def backward(tasks):
        params = detached(net)
        each = (list(gradient(params, *task).values()) for task in zip(*tasks, strict=True))
        total = next(each)
        for grads in each:
            torch._foreach_add_(total, grads)
        torch._foreach_div_(total, len(tasks[0]))
        for p, g in zip(net.parameters(), total, strict=True):
            p.grad = g

    return backward


def with_autograd(net, row, order):
    """Return the backward pass of plain autograd: a loop over tasks with `create_graph=True`."""

    def maml(xs, ys, xq, yq):
        params = dict(net.named_parameters())
        for _ in range(row.inner_steps):
            value = F.cross_entropy(torch.func.functional_call(net, params, (xs,)), ys)
            grads = torch.autograd.grad(value, list(params.values()), create_graph=order == "second")
            params = {name: p - row.inner_lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, params, (xq,)), yq)

    def prototypical(xs, ys, xq, yq):
        del ys
        return prototypical_loss(net(torch.cat([xs, xq])), yq, row)

    loss = maml if row.inner_steps else prototypical

    def backward(tasks):
        for task in zip(*tasks, strict=True):
            (loss(*task) / len(tasks[0])).backward()

    return backward


def with_higher(net, row, order):
    """Return the backward pass of higher: a loop over tasks.

    The initial weights are not copied, so that they receive gradients.
    """
    higher = importlib.import_module("higher")

    def constants(grads):
        return [g.detach() for g in grads]

    def backward(tasks):
        sgd = torch.optim.SGD(net.parameters(), lr=row.inner_lr)
        for xs, ys, xq, yq in zip(*tasks, strict=True):
            with higher.innerloop_ctx(net, sgd, copy_initial_weights=False, track_higher_grads=True) as (
                fast,
                optimizer,
            ):
                for _ in range(row.inner_steps):
                    value = F.cross_entropy(fast(xs), ys)
                    optimizer.step(value, grad_callback=constants if order == "first" else None)
                (F.cross_entropy(fast(xq), yq) / len(tasks[0])).backward()

    return backward


def with_learn2learn(net, row, order):
    """Return the backward pass of learn2learn: a loop over tasks of clone, adapt and backward."""
    learn2learn = importlib.import_module("learn2learn")

    def backward(tasks):
        maml = learn2learn.algorithms.MAML(net, lr=row.inner_lr, first_order=order == "first")
        for xs, ys, xq, yq in zip(*tasks, strict=True):
            learner = maml.clone()
            for _ in range(row.inner_steps):
                learner.adapt(F.cross_entropy(learner(xs), ys))
            (F.cross_entropy(learner(xq), yq) / len(tasks[0])).backward()

    return backward


PEERS = {
    "torch.func": with_func,
    "torch.autograd": with_autograd,
    "higher": with_higher,
    "learn2learn": with_learn2learn,
    "torch.compile, loop": with_compiled_loop,
    "torch.compile, vmap": with_compiled_vmap,
}
NAMES = (*PEERS, "torch.compile")
EAGER = tuple(name for name in NAMES if not name.startswith("torch.compile"))
FORMS = {"contiguous": torch.contiguous_format, "channels last": torch.channels_last}
# Under vmap the memory format has no meaning; a loop over tasks can use either.
VMAPPED = ("torch.func", "torch.compile, vmap")


class Peer:
    """One way of computing the meta-step, on one device, in one memory format and the type of `params`."""

    def __init__(self, name, row, params, device, order, form):
        self.row, self.device, self.form = row, device, form
        self.net, self.backward = self.make(name, order)
        values = {k: torch.tensor(np.ascontiguousarray(v)) for k, v in self.from_ours(params, row).items()}
        self.net.to(device, next(iter(values.values())).dtype)
        self.net.load_state_dict(values)
        self.net.to(memory_format=FORMS[form])
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=row.outer_lr, fused=True)

    @staticmethod
    def forms(name):
        """Return the memory formats to try."""
        del name
        return ("contiguous",)

    @staticmethod
    def from_ours(params, row):
        """Return our parameters as a dict of NumPy arrays by torch's names."""
        raise NotImplementedError

    def make(self, name, order):
        """Return the network and its function `backward`."""
        raise NotImplementedError

    def tensors(self, tasks):
        """Return NumPy arrays `(xs, ys, xq, yq)` with a leading task axis as tensors in torch's layout."""
        raise NotImplementedError

    def gradient(self, tasks):
        """Return the mean meta-gradient over `tasks` (NumPy) as NumPy arrays by torch's names."""
        self.optimizer.zero_grad(set_to_none=True)
        self.backward(self.tensors(tasks))
        return {name: p.grad.cpu().numpy() for name, p in self.net.named_parameters()}

    def steps(self, count, tensors):
        """Run `count` meta-steps and wait for the device."""
        for _ in range(count):
            self.optimizer.zero_grad(set_to_none=True)
            self.backward(tensors)
            self.optimizer.step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self, tensors):
        """Return the most bytes that tensors take during a meta-step on a GPU, or None on a CPU."""
        if self.device != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats()
        self.steps(1, tensors)
        return torch.cuda.max_memory_allocated()


class ConvPeer(Peer):
    """MAML and prototypical networks."""

    def make(self, name, order):
        # A compiler turns both into tensor operations, and those of the explicit one sooner.
        explicit = name == "torch.func" or name.startswith("torch.compile")
        net = Net(self.row, ExplicitBatchNorm if explicit else nn.BatchNorm2d)
        return net, PEERS[name](net, self.row, order)

    @staticmethod
    def forms(name):
        return ("contiguous",) if name in VMAPPED else tuple(FORMS)

    @staticmethod
    def from_ours(params, row):
        """Return our parameters by torch's names, with mirrored kernels where the network is strided.

        With stride 2, SAME pads the end of an image and torch's `padding=1` its start. On mirrored images and
        kernels torch's network computes the same function without a separate padding pass.
        """
        params, out = params["model"], {}
        for i in range(row.blocks):
            block = params[f"ConvNorm_{i}"]
            kernel = block["conv"]["kernel"]
            mirrored = kernel[::-1, ::-1] if row.strided else kernel
            out[f"blocks.{i}.conv.weight"] = mirrored.transpose(3, 2, 0, 1)
            out[f"blocks.{i}.conv.bias"] = block["bias"]
            out[f"blocks.{i}.norm.weight"] = block["norm"]["scale"]
            out[f"blocks.{i}.norm.bias"] = block["norm"]["bias"]
        if not row.inner_steps:
            return out
        head = params["head"]["kernel"]
        if not row.strided:
            side = round((row.features // row.filters) ** 0.5)
            head = head.reshape(side, side, row.filters, -1).transpose(2, 0, 1, 3).reshape(row.features, -1)
        return {**out, "head.weight": head.T, "head.bias": params["head"]["bias"]}

    def tensors(self, tasks):
        def images(x):
            x = (x[:, :, ::-1, ::-1] if self.row.strided else x).transpose(0, 1, 4, 2, 3)
            x = torch.tensor(np.ascontiguousarray(x), device=self.device)
            return x.flatten(0, 1).contiguous(memory_format=FORMS[self.form]).unflatten(0, x.shape[:2])

        xs, ys, xq, yq = tasks
        labels = [torch.tensor(y, dtype=torch.long, device=self.device) for y in (ys, yq)]
        return images(xs), labels[0], images(xq), labels[1]


class MemoryNet(nn.Module):
    """An LSTM with a memory of least recently used access (LRUA), on a batch of sequences."""

    def __init__(self, row):
        super().__init__()
        self.row = row
        reads = row.heads * row.width
        self.inputs = nn.Linear(int(np.prod(row.image)) + row.ways, 4 * row.hidden)
        self.recurrent = nn.Linear(row.hidden + reads, 4 * row.hidden, bias=False)
        self.keys = nn.Linear(row.hidden, reads)
        self.gates = nn.Linear(row.hidden, row.heads)
        self.head = nn.Linear(row.hidden + reads, row.ways)

    def forward(self, inputs):
        """Map `(time, batch, width)` to `(time, batch, ways)`."""
        row, batch = self.row, inputs.shape[1]
        memory = inputs.new_zeros(batch, row.rows, row.width)
        usage = inputs.new_zeros(batch, row.rows)
        usage[:, 0] = 1
        weights = usage[:, None].expand(batch, row.heads, row.rows)
        reads = inputs.new_zeros(batch, row.heads * row.width)
        h = c = inputs.new_zeros(batch, row.hidden)
        features = []
        # Projecting the inputs of all steps at once is faster than an LSTMCell in the loop.
        for projected in self.inputs(inputs):
            gates = projected + self.recurrent(torch.cat([h, reads], 1))
            input_gate, forget_gate, candidate, output_gate = gates.chunk(4, 1)
            c = torch.sigmoid(forget_gate + 1) * c + torch.sigmoid(input_gate) * torch.tanh(candidate)
            h = torch.sigmoid(output_gate) * torch.tanh(c)
            keys = torch.tanh(self.keys(h)).unflatten(1, (row.heads, row.width))
            gates = torch.sigmoid(self.gates(h))[:, :, None]
            least = usage.detach().topk(row.heads, 1, largest=False, sorted=True).indices
            marked = torch.zeros_like(usage).scatter_(1, least, 1.0)
            erased = torch.zeros_like(usage).scatter_(1, least[:, :1], 1.0)
            written = gates * weights + (1 - gates) * marked[:, None]
            memory = torch.baddbmm(memory * (1 - erased)[:, :, None], written.transpose(1, 2), keys)
            weights = torch.softmax(normalize(keys) @ normalize(memory).transpose(1, 2), -1)
            usage = 0.99 * usage + weights.sum(1) + written.sum(1)
            reads = (weights @ memory).flatten(1)
            features.append(torch.cat([h, reads], 1))
        return self.head(torch.stack(features))


def normalize(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-12)


class SequencePeer(Peer):
    """Memory-augmented networks; all sequences advance together."""

    def make(self, name, order):
        del order
        net = MemoryNet(self.row)
        forward = compiled(net) if name == "torch.compile" else net

        def backward(tasks):
            x, y = tasks
            labels = F.one_hot(y, self.row.ways).to(x.dtype)
            before = torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1]], 1)
            outputs = forward(torch.cat([x, before], 2).transpose(0, 1)).transpose(0, 1)
            (F.cross_entropy(outputs.flatten(0, 1), y.flatten(), reduction="sum") / len(x)).backward()

        return net, backward

    @staticmethod
    def from_ours(params, row):
        network = params["network"]
        layers = {name: network[name] for name in ("inputs", "recurrent", "head")}
        layers |= {name: network["memory"][name] for name in ("keys", "gates")}
        weights = {f"{name}.weight": layer["kernel"].T for name, layer in layers.items()}
        return weights | {f"{name}.bias": layer["bias"] for name, layer in layers.items() if "bias" in layer}

    def tensors(self, tasks):
        x, y = tasks[:2]
        x = torch.tensor(x, device=self.device).flatten(2)
        return x, torch.tensor(y, dtype=torch.long, device=self.device)


def kind_of(row):
    """Return the subclass of `Peer` for a row."""
    return SequencePeer if isinstance(row, SequenceRow) else ConvPeer


def configure(threads, full_precision):
    """Set threads and matrix-product precision; return a description."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("highest" if full_precision else "high")
    torch.backends.cudnn.allow_tf32 = not full_precision
    torch.backends.cudnn.benchmark = True
    return f"torch {torch.__version__} with {threads} CPU threads"
