"""Every key there is, with its default and its meaning. A config file states only what differs.

    config = base.get_config(algorithm="dapo", task="files")

The sections `algorithm` and `task` hold the keyword arguments of the chosen constructor (`tapojax/algorithms`,
`tapojax/tasks`), so each config shows just the knobs that act. Lengths are in tokens.
"""

from ml_collections import ConfigDict

from launch import sections


def get_config(*, algorithm: str = "grpo", task: str = "arithmetic") -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = 100  # rollout batches
    c.prompts_per_step = 16
    c.group_size = 8  # completions of each prompt
    c.algorithm = sections.algorithm_defaults(algorithm)
    c.task = sections.task_defaults(task)

    c.model = ConfigDict()
    c.model.preset = "gym-small"  # a name in tapojax/models/presets.py; read when path is empty
    c.model.path = ""  # folder with a Hugging Face checkpoint; empty: random parameters of the preset's shape
    c.model.dtype = "float32"  # of activations and products: float32, bfloat16
    c.model.param_dtype = "float32"
    c.model.remat = "none"  # or a member of jax.checkpoint_policies, such as nothing_saveable
    c.model.unroll = True  # unroll the layers: fast for small models, slow to compile for deep ones

    c.sampling = ConfigDict()
    c.sampling.max_prompt_tokens = 16
    c.sampling.max_tokens = 32  # of a completion
    c.sampling.temperature = 1.0
    c.sampling.top_k = 0  # 0: off
    c.sampling.top_p = 1.0  # 1: off
    c.sampling.stop_token_ids = ()  # that end a completion, beside the tokenizer's end token
    c.sampling.dtype = "float32"  # of the sampler's copy of the parameters

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-6
    c.optimizer.schedule = "constant"  # constant, linear or cosine, after the warm-up
    c.optimizer.warmup_updates = 0
    c.optimizer.end_fraction = 0.0  # of the learning rate, at the end of linear or cosine
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.eps = 1e-8
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 1.0

    c.train = ConfigDict()
    c.train.minibatches = 1  # optimizer updates a pass over the rollout batch
    c.train.epochs = 1  # passes over the rollout batch
    c.train.microbatches = 1  # parts of a minibatch whose gradients are added; changes memory, not results
    c.train.max_logit_bytes = 2**27  # of one chunk of the vocabulary head
    c.train.max_nonfinite = 3  # skipped updates in a row before the run stops
    c.train.correction = "none"  # train/rollout mismatch: none, token or sequence truncated importance weights
    c.train.correction_cap = 2.0

    c.collect = ConfigDict()
    c.collect.max_rounds = 10  # of dynamic sampling before the run stops
    c.collect.max_error_share = 0.2  # of rows without a score before the run stops

    c.judge = ConfigDict()  # whose verdicts are the score channel "flawed", instead of the task's own
    c.judge.workdir = ""  # of a finished run of configs/genrm_gym.py; empty: no judge
    c.judge.temperature = 0.0
    c.judge.batch_rows = 64  # criticised at a time

    c.sft = ConfigDict()  # supervised warm start on the task's demonstrations
    c.sft.updates = 0
    c.sft.batch_size = 96
    c.sft.learning_rate = 1e-5
    c.sft.warmup_updates = 20

    c.evaluation = ConfigDict()
    c.evaluation.every = 0  # steps; 0: only before and after
    c.evaluation.samples = 4  # of each problem
    c.evaluation.batch_prompts = 64
    c.evaluation.temperature = 1.0
    c.evaluation.top_p = 1.0

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # steps
    c.checkpoint.keep = 2

    c.mesh = ConfigDict()  # devices along each axis
    c.mesh.data = 1
    c.mesh.fsdp = 1
    c.mesh.tensor = 1
    c.mesh.context = 1

    c.log = ConfigDict()
    c.log.tensorboard = True
    c.log.rollouts = 4  # sampled completions written down a step
    c.log.profile_step = 0  # the step to profile, 0: none
    return c


def choose(file: str, mode: str, modes) -> str:
    """The mode of a config file that `--config=configs/file.py:mode` asks for; the first for none and for quicktest.

    Raises:
      ValueError: there is no such mode.
    """
    if mode and mode != "quicktest" and mode not in modes:
        raise ValueError(f"configs/{file}.py:{mode} is unknown: say :quicktest or one of {[*modes]}")
    return mode if mode in modes else next(iter(modes))
