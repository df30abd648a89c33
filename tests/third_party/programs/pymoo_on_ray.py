"""pymoo's example of a problem that is evaluated on Ray (its documentation, "Parallelization")."""

import ray
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.ray import RayParallelization


class MyProblem(ElementwiseProblem):
    def __init__(self, **kwargs):
        super().__init__(n_var=10, n_obj=1, n_ieq_constr=0, xl=-5, xu=5, **kwargs)

    def _evaluate(self, x, out, *args, **kwargs):
        out["F"] = (x**2).sum()


ray.init()
problem = MyProblem(elementwise_runner=RayParallelization(job_resources={"num_cpus": 1}))
res = minimize(problem, GA(pop_size=20), termination=("n_gen", 5), seed=1)
alone = minimize(MyProblem(), GA(pop_size=20), termination=("n_gen", 5), seed=1)
print("as alone:", bool((res.F == alone.F).all()), "generations:", res.algorithm.n_gen)
ray.shutdown()
