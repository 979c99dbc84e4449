"""Slow float64 references, written from the papers in numpy; they share nothing with the package.

Each takes a list of gradients (numpy arrays, one a step) and returns the parameter after each step.
"""

import numpy as np


def decay(theta, grad, *, lr, weight_decay, weight_decouple, absolute):
    """Loshchilov and Hutter, 2019: L2 in the gradient, or on the parameter."""
    if not weight_decouple:
        return theta, grad + weight_decay * theta
    return theta * (1.0 - weight_decay * (1.0 if absolute else lr)), grad


def adam(theta, grads, *, lr, betas, eps, optimized_update, wd):
    """Kingma and Ba, 2015, Algorithm 1, or its reordering at the end of Section 2."""
    m, v, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(grads, start=1):
        theta, g = decay(theta, g, lr=lr, **wd)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        if optimized_update:
            alpha = lr * np.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t)
            theta = theta - alpha * m / (np.sqrt(v) + eps)
        else:
            m_hat, v_hat = m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)
            theta = theta - lr * m_hat / (np.sqrt(v_hat) + eps)
        path.append(theta)
    return path


def radam(theta, grads, *, lr, betas, eps, optimized_update, amsgrad, degenerated_to_sgd, wd):
    """Liu et al., 2020, Algorithm 2, tractable from rho_t >= 5."""
    m, v, v_max, path = np.zeros_like(theta), np.zeros_like(theta), np.zeros_like(theta), []
    rho_inf = 2 / (1 - betas[1]) - 1
    for t, g in enumerate(grads, start=1):
        theta, g = decay(theta, g, lr=lr, **wd)
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        v_max = np.maximum(v_max, v)
        second = v_max if amsgrad else v
        rho = rho_inf - 2 * t * betas[1] ** t / (1 - betas[1] ** t)
        m_hat = m / (1 - betas[0] ** t)
        if rho >= 5:
            r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
            root = np.sqrt(1 - betas[1] ** t)
            if optimized_update:
                theta = theta - lr * r * m_hat * root / (np.sqrt(second) + eps)
            else:
                theta = theta - lr * r * m_hat / (np.sqrt(second) / root + eps)
        elif degenerated_to_sgd:
            theta = theta - lr * m_hat
        path.append(theta)
    return path


def sophia(theta, grads, estimates, *, lr, betas, eps, rho, k, wd):
    """Liu et al., 2023, Algorithm 3, with lr = eta * rho; `estimates[t]` is read when due."""
    m, h, path = np.zeros_like(theta), np.zeros_like(theta), []
    for t, g in enumerate(grads, start=1):
        theta, g = decay(theta, g, lr=lr, **wd)
        m = betas[0] * m + (1 - betas[0]) * g
        if t % k == 1 % k:
            h = betas[1] * h + (1 - betas[1]) * estimates[t - 1]
        eta = lr / rho
        theta = theta - eta * np.clip(m / np.maximum(h, eps), -rho, rho)
        path.append(theta)
    return path
