"""TaskSet's two optimizers with many hyperparameters, and the samplers that make their configurations.

``NAdamW`` comes with a list of 1000 configurations, sorted so that a user need only try the first few. ``Adam8p`` is
random search over eight hyperparameters. Both know the number of steps.

Source: arXiv:2002.11887 (the list, its sampler, NAdamW), arXiv:2009.11243, appendix D (Adam8p).
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

#: Length of the runs for which TaskSet searched; Adam8p's decays are per step of a run of this length.
TASK_SET_STEPS = 10_000

_ORDER = """
251 611 799 209 739 713 437 25 342 743 515 324 135 705 934 741 119 770 794 189 829 607 68 958 700 527 865 807
364 374 639 579 494 409 153 697 797 986 111 410 274 941 150 853 90 422 795 937 148 787 116 336 198 327 693 390
999 801 118 385 296 597 726 900 338 985 249 672 760 160 507 666 944 8 604 12 344 989 261 966 343 247 493 175 350
17 476 509 161 813 407 18 191 58 996 230 203 621 737 165 426 180 529 181 447 964 594 348 96 39 159 368 919 252
695 321 292 452 692 593 414 225 239 889 904 421 483 808 605 876 535 823 606 724 762 187 752 255 65 550 413 439
371 569 152 943 590 329 245 103 298 471 34 223 114 803 753 7 761 698 933 71 376 310 613 300 980 319 868 193 323
679 499 302 53 728 842 723 333 27 392 462 228 54 963 637 616 406 686 824 258 381 534 16 827 238 852 759 562 427
234 345 137 906 626 346 416 31 614 945 536 356 67 206 398 146 124 197 408 306 634 4 820 164 589 673 453 481 953
243 339 545 328 341 411 465 220 523 834 60 547 55 782 833 136 281 561 600 910 792 5 500 503 158 46 479 624 653
313 669 29 488 331 335 417 796 573 778 779 521 846 66 496 712 967 924 215 289 141 704 221 384 725 226 273 981 23
98 76 769 880 282 857 15 322 155 271 533 519 968 387 317 877 894 432 745 740 316 510 399 270 694 898 126 100 849
576 183 423 839 541 776 809 132 40 464 397 854 707 544 42 233 654 816 790 395 340 121 871 942 935 773 373 463
405 361 595 777 22 418 190 388 127 185 125 577 84 615 781 775 219 969 936 742 268 563 721 235 196 466 128 749
231 696 450 147 793 993 497 461 628 539 747 663 120 655 172 105 363 574 567 382 44 664 179 129 629 280 720 490
218 64 320 326 516 995 708 812 729 130 400 890 847 32 287 862 49 638 456 480 551 802 640 814 805 262 123 112 78
224 459 804 703 706 45 940 665 645 599 878 727 299 668 658 138 445 542 902 691 454 987 903 69 151 845 201 430 2
722 649 312 290 478 524 875 451 974 960 575 956 278 835 938 59 843 162 52 227 508 431 532 443 908 170 780 718
667 394 783 530 716 581 248 389 881 178 115 681 232 925 961 570 449 734 279 87 994 531 714 140 859 199 182 43
277 3 892 473 94 256 625 772 176 584 873 951 401 684 47 861 928 660 195 99 240 635 428 538 386 558 855 367 992
784 525 214 998 620 751 764 355 540 636 216 652 97 771 311 819 429 864 257 949 912 591 38 955 351 785 484 851
887 646 983 840 285 765 976 571 212 492 676 838 133 907 583 888 622 173 675 352 149 402 504 229 939 330 354 899
487 404 738 886 768 930 177 26 774 131 318 758 786 572 921 965 554 631 766 0 560 104 301 415 244 587 962 156 931
702 750 677 145 217 505 85 526 929 926 552 788 811 304 63 601 444 448 194 30 143 619 717 372 101 548 688 10 236
56 82 821 210 867 670 950 610 489 200 501 603 988 555 836 817 630 895 641 872 565 242 564 286 866 107 474 661
517 837 391 383 420 393 412 991 682 869 856 36 284 627 19 424 482 266 733 735 511 380 288 585 680 818 14 689 520
485 51 75 990 754 848 755 377 922 719 134 166 106 896 102 732 662 440 946 651 297 502 832 954 362 436 971 6 441
253 11 710 959 92 275 828 831 491 891 91 276 883 970 917 139 272 309 648 715 202 979 358 841 972 512 403 83 267
586 789 744 70 860 916 359 678 308 144 469 612 602 977 830 901 237 568 186 518 858 117 347 893 294 618 798 213
756 62 844 446 470 559 982 154 458 632 79 468 596 472 592 882 920 701 307 767 826 28 314 205 650 433 952 608 24
498 685 549 580 763 379 57 588 264 163 746 265 975 167 168 885 357 369 360 623 825 396 74 122 914 537 475 757
578 157 927 506 425 656 467 291 984 457 659 419 748 522 460 184 315 9 110 192 169 81 37 207 671 973 174 61 305
997 683 21 810 948 617 822 514 303 222 378 259 435 897 477 93 909 325 947 874 643 33 50 791 442 241 365 815 736
644 731 366 142 370 88 455 375 674 711 730 513 647 806 48 211 879 250 113 850 86 204 687 260 72 246 95 89 332 41
1 905 337 863 188 334 208 609 495 566 657 486 35 254 353 633 13 699 295 870 978 556 923 269 884 293 911 553 800
349 709 913 263 598 582 557 77 434 80 546 109 528 20 543 108 915 932 171 690 957 73 642 438 918 283
"""

#: Seeds of the sampler in the order of the published list, best first.
ORDER = tuple(map(int, _ORDER.split()))


def nadamw_config(seed: int) -> dict[str, Any]:
    """Hyperparameters of :class:`NAdamW` that TaskSet's sampler draws from ``seed``.

    Example:
        >>> round(nadamw_config(ORDER[0])["lr"], 7)
        0.0011948
    """
    random = np.random.RandomState(seed + 14358)  # a stream that NumPy has frozen
    config: dict[str, Any] = {
        "lr": _log_uniform(random, 1e-5, 1.0),
        "beta1": 1 - _log_uniform(random, 1e-3, 1.0),
        "beta2": 1 - _log_uniform(random, 1e-5, 1.0),
        "eps": _log_uniform(random, 1e-8, 1e4),
        "nesterov": bool(random.uniform() > 0.5),
    }
    kind = random.uniform()
    config["weight_decay"] = 0.0 if 0.3333 <= kind < 0.6666 else _log_uniform(random, 1e-5, 1e-1)
    config["l2"] = 0.0 if kind < 0.3333 else _log_uniform(random, 1e-5, 1e-1)
    config["warmup_fraction"] = _log_uniform(random, 1e-5, 1e-1) if random.uniform() > 0.5 else 0.0
    config["min_lr_fraction"] = 0.0 if random.uniform() > 0.5 else _log_uniform(random, 1e-5, 1.0)
    config["constant_fraction"] = float(random.uniform())
    return config


def adam8p_config(seed: int) -> dict[str, Any]:
    """Hyperparameters of :class:`Adam8p` that TaskSet's sampler draws from ``seed``.

    Example:
        >>> 1e-8 < adam8p_config(0)["lr"] < 10
        True
    """
    random = np.random.RandomState(seed)
    return {
        "lr": _log_uniform(random, 1e-8, 1e1),
        "beta1": 1 - _log_uniform(random, 1e-4, 1.0),
        "beta2": 1 - _log_uniform(random, 1e-6, 1.0),
        "eps": _log_uniform(random, 1e-10, 1e3),
        "l1": _log_uniform(random, 1e-8, 1e1),
        "l2": _log_uniform(random, 1e-8, 1e1),
        "linear_decay": _log_uniform(random, 1e-7, 1e-4),
        "exponential_decay": _log_uniform(random, 1e-3, 1e-6),
    }


class _Stepwise(torch.optim.Optimizer):
    """An optimizer with two moments per parameter that knows its length and counts its steps."""

    def __init__(self, params: Iterable[Tensor], steps: int, defaults: dict[str, Any]) -> None:
        if steps < 1:
            raise ValueError(f"steps: expected at least 1, got {steps}")
        super().__init__(params, {**defaults, "steps": steps, "step": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update; a closure is called first, with gradients enabled, and its value returned."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for param in params:
                if not self.state[param]:
                    self.state[param] = {"mom": torch.zeros_like(param), "rms": torch.zeros_like(param)}
            states = [self.state[param] for param in params]
            if params:
                grads = [param.grad for param in params]
                self._update(group, params, grads, [s["mom"] for s in states], [s["rms"] for s in states])
            group["step"] += 1
        return value

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], mom: list[Tensor], rms: list[Tensor]
    ) -> None:
        raise NotImplementedError


class NAdamW(_Stepwise):
    """Adam with Nesterov's momentum, two kinds of weight decay, and a schedule of warm-up, plateau and cosine.

    At step t = 0, 1, ... with moments m and v of g, the gradient minus ``l2 param`` (the published sign):

    ``param -= a_t ((beta1 m + (1 - beta1) g, or m without nesterov) / (sqrt(v) + eps) + weight_decay param)``

    with ``a_t = lr_t sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1))``, so that decay and eps differ from torch's.
    ``lr_t`` rises linearly from 0 to lr, stays, and falls from ``constant_fraction`` of the steps on, along half a
    cosine, to ``min_lr_fraction lr``.

    Args:
        warmup: how warm-up and plateau combine. ``"min"`` is TaskSet's code and the intent: warm-up takes
            ``warmup_fraction`` of the steps, at most the plateau. ``"max"`` is the published PyTorch and JAX code: a
            warm-up, however short, takes the whole plateau.

    Source: arXiv:2002.11887; the update and the schedule were checked against vectors recorded from the JAX code.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        steps: int,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        nesterov: bool,
        weight_decay: float,
        l2: float,
        warmup_fraction: float,
        min_lr_fraction: float,
        constant_fraction: float,
        warmup: Literal["min", "max"] = "min",
    ) -> None:
        warm = {"min": min, "max": max}[warmup](warmup_fraction, constant_fraction) if warmup_fraction > 0 else 0.0
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "nesterov": nesterov}
        defaults |= {"weight_decay": weight_decay, "l2": l2, "min_lr_fraction": min_lr_fraction}
        defaults |= {"warmup_steps": steps * warm, "constant_steps": steps * constant_fraction}
        super().__init__(params, steps, defaults)

    @staticmethod
    def learning_rate(group: dict[str, Any]) -> float:
        """``lr_t`` of the step that comes."""
        lr, plateau = float(group["lr"]), float(group["constant_steps"])
        step = float(min(group["step"], group["steps"]))
        if step < group["warmup_steps"]:
            return lr * step / float(group["warmup_steps"])
        least = lr * float(group["min_lr_fraction"])
        phase = math.pi * max(step - plateau, 0.0) / max(group["steps"] - plateau, 1e-12)
        return least + (lr - least) * (1 + math.cos(phase)) / 2

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], mom: list[Tensor], rms: list[Tensor]
    ) -> None:
        beta1, beta2, t = group["beta1"], group["beta2"], group["step"] + 1
        size = self.learning_rate(group) * math.sqrt(1 - beta2**t) / (1 - beta1**t)
        grads = list(torch._foreach_sub(grads, params, alpha=group["l2"])) if group["l2"] else grads
        _moments(grads, mom, rms, beta1, beta2)
        top = mom
        if group["nesterov"]:
            top = list(torch._foreach_mul(mom, beta1))
            torch._foreach_add_(top, grads, alpha=1 - beta1)
        bottom = torch._foreach_sqrt(rms)
        torch._foreach_add_(bottom, group["eps"])
        change = list(torch._foreach_div(top, bottom))
        torch._foreach_add_(change, params, alpha=group["weight_decay"])
        torch._foreach_add_(params, change, alpha=-size)


class Adam8p(_Stepwise):
    """Adam on ``loss + l2 |param|^2 + l1 |param|_1``, whose learning rate decays linearly and exponentially.

    ``param -= lr_t m / (1 - beta1^(t+1)) / (sqrt(v / (1 - beta2^(t+1)) + 1e-10) + eps)`` at step t = 0, 1, ... with
    ``lr_t = lr max(1 - linear_decay s, 0) exp(-exponential_decay s)`` and s = 10000 t / steps.

    Source: arXiv:2009.11243, appendix D; TaskSet's code has the rescaling of t and the 1e-10.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        steps: int,
        *,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        l1: float,
        l2: float,
        linear_decay: float,
        exponential_decay: float,
    ) -> None:
        defaults = {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "l1": l1, "l2": l2}
        defaults |= {"linear_decay": linear_decay, "exponential_decay": exponential_decay}
        super().__init__(params, steps, defaults)

    def _update(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], mom: list[Tensor], rms: list[Tensor]
    ) -> None:
        beta1, beta2, t = group["beta1"], group["beta2"], group["step"] + 1
        at = TASK_SET_STEPS * group["step"] / group["steps"]
        lr = group["lr"] * max(1 - group["linear_decay"] * at, 0.0) * math.exp(-group["exponential_decay"] * at)
        grads = list(torch._foreach_add(grads, params, alpha=2 * group["l2"]))
        torch._foreach_add_(grads, torch._foreach_sign(params), alpha=group["l1"])
        _moments(grads, mom, rms, beta1, beta2)
        bottom = torch._foreach_div(rms, 1 - beta2**t)
        torch._foreach_add_(bottom, 1e-10)
        torch._foreach_sqrt_(bottom)
        torch._foreach_add_(bottom, group["eps"])
        torch._foreach_addcdiv_(params, mom, bottom, value=-lr / (1 - beta1**t))


def _moments(grads: list[Tensor], mom: list[Tensor], rms: list[Tensor], beta1: float, beta2: float) -> None:
    torch._foreach_mul_(mom, beta1)
    torch._foreach_add_(mom, grads, alpha=1 - beta1)
    torch._foreach_mul_(rms, beta2)
    torch._foreach_addcmul_(rms, grads, grads, value=1 - beta2)


def _log_uniform(random: np.random.RandomState, low: float, high: float) -> float:
    return float(np.exp(random.uniform(np.log(low), np.log(high))))
