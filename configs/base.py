"""Every key there is, with its default and its meaning. A config file states only what differs.

    config = base.get_config(algorithm="dapo", task="files")

The sections `algorithm`, `task` and `judge` hold the keyword arguments of the chosen constructor (`tapojax/algorithms`,
`tapojax/tasks`, `tapojax/judges`), so each config shows just the knobs that act. Lengths are in tokens.
"""

from ml_collections import ConfigDict

from launch import sections


def get_config(
    *, algorithm: str = "grpo", task: str = "arithmetic", judge: str = "", answer_judge: str = ""
) -> ConfigDict:
    c = ConfigDict()
    c.seed = 0
    c.steps = 100  # rollout batches
    c.prompts_per_step = 16
    c.group_size = 8  # completions of each prompt
    c.algorithm = sections.algorithm_defaults(algorithm)
    c.task = sections.task_defaults(task)

    c.curriculum = ConfigDict()  # problems by pass rate: that of their last group in this run, before it the task's
    c.curriculum.pass_rates = (0.0, 1.0)  # of the problems that are trained; (0, 1): all, in plain order
    c.curriculum.outside = 0.0  # probability that another one is

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
    c.sampling.stream_tokens = 32  # after so many tokens the embedded sampler hands out the rows that ended

    c.rollout = sections.rollout_defaults()  # where completions are sampled; the keys are remote.Options
    c.rollout.addresses = ()  # of launch.serve_rollouts, such as ("gpu1:7777", "gpu2:7777"); empty: here

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

    c.mismatch = ConfigDict()  # of log-probs, trainer's minus sampler's, λ; over sampled tokens, in nats; 0: no limit
    c.mismatch.warn = 0.0  # a batch whose mean of exp(λ) - 1 - λ is above is told
    c.mismatch.stop = 0.0  # above this the run stops
    c.mismatch.mask = 0.0  # tokens or rows above this leave the loss
    c.mismatch.mask_estimator = "k3"  # k1: -λ, on both sides of 0; k2: λ²/2; k3: exp(λ) - 1 - λ
    c.mismatch.mask_level = "token"  # token by itself, or a row by the mean, sum or max of its tokens

    c.asynchrony = ConfigDict()
    c.asynchrony.staleness = 0  # versions of the weights that a batch may lag behind; 0: strictly on-policy
    c.asynchrony.in_flight = False  # new weights reach completions that are being sampled; takes rollout.addresses
    c.asynchrony.record = False  # write batches and schedule to recorded/
    c.asynchrony.replay = ""  # recorded/ of another run: train on its batches, sample none

    c.collect = ConfigDict()
    c.collect.max_rounds = 10  # of dynamic sampling before the run stops
    c.collect.max_error_share = 0.2  # of rows without a score before the run stops

    c.reward = ConfigDict()  # where completions are scored
    c.reward.addresses = ()  # of launch.serve_rewards, such as ("big1:7788", "big2:7788"); empty: in this process
    c.reward.overlap = True  # score rows while others are sampled; False: all in one call, after that
    c.reward.chunk_rows = 32  # that are scored in one call, at most, with overlap
    c.reward.threads = 8  # calls at a time, with overlap
    c.reward.wait_s = 1800.0  # for scores after sampling has ended; rows that come later go without one
    c.reward.deadline_s = 60.0  # of one try of a chunk of rows at a server
    c.reward.retries = 3  # of a chunk, on other servers, before its rows go without a score
    c.reward.token_file = ""  # what is shown to the servers
    c.reward.authority_file = ""  # who signed the servers' certificates; needed beyond loopback
    c.reward.certificate_file = ""  # of this process, for mutual TLS
    c.reward.key_file = ""

    c.judge = sections.judge_defaults(judge)  # whose verdicts are a score channel: a name in judges.PLACES; "": none
    c.answer_judge = sections.answer_judge_defaults(answer_judge)  # "answer": looks again at wrong rows; "": nobody

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
