"""The dynamics of RL, measured: how noisy a gradient is, why entropy falls, what an update changes.

docs/dynamics.md derives each formula and says what it assumes. The order to read:

    measured.py    a checkpoint as a function of its trained parameters theta, in any precision
    noise.py       the gradient's noise: tr Sigma and |g|^2, unbiased, from whole prompt groups
    online.py      the same in training, from a step's two halves
    entropy.py     the entropy H of completions, its gradient, its value at weights nearby
    step.py        the update v, by hand, from the optimizer's state and a gradient
    change.py      what v does to H: to first and second order, and truly
    kernel.py      what learning one completion does to another: the Fisher kernel
    source.py      a checkpoint of RL, and completions of its model
    covariance.py  which tokens make the entropy fall

The letters are gpt.py's, and besides

    theta   the trained parameters, n numbers; with LoRA its A and B and nothing else
    t       a prompt with its completion; k: a position in the completion
    l_k     log pi(token k | what is before it); log pi(t) = sum_k l_k
    H_k     entropy of the distribution that token k is sampled from, in nats
    v       the update: theta after a step less theta before it; u = v / lr
    A(t)    the advantage; N the tokens that the step's loss is divided by
    M       the optimizer's diagonal preconditioner: a gradient g moves theta by - M g

A vector over theta is a dict {name: tensor}, as named_parameters() has the names.
"""
