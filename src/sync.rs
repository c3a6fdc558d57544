//! Locks, atomics and tasks of the parts that have a model: the outbox, the fan-out of pushes, the budget of
//! messages, the places of a package.
//!
//! These are those of std and tokio. In the models `shuttle` takes their place: it runs the same code in
//! thousands of orders, and picks at each lock, atomic and await which task goes on. It is sequentially
//! consistent: it finds lost wake-ups and wrong orders of steps, but no `Relaxed` that had to be stronger.

#[cfg(not(all(test, feature = "models")))]
pub(crate) use self::real::*;

#[cfg(all(test, feature = "models"))]
pub(crate) use self::model::*;

#[cfg(not(all(test, feature = "models")))]
mod real {
    pub(crate) use std::sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize},
    };
    pub(crate) use tokio::{spawn, task::yield_now, time::sleep};
}

#[cfg(all(test, feature = "models"))]
mod model {
    use std::{mem, sync::Arc, time::Duration};

    use shuttle::{
        Config, MaxSteps, Runner,
        scheduler::{PctScheduler, RandomScheduler, Scheduler},
    };
    pub(crate) use shuttle::{
        future::yield_now,
        sync::{
            Mutex, MutexGuard,
            atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize},
        },
    };

    /// Starts a task that has to end: one that waits for ever fails the model.
    pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) {
        mem::forget(shuttle::future::spawn(task));
    }

    /// Any time may pass meanwhile, or none.
    pub(crate) async fn sleep(_: Duration) {
        yield_now().await;
    }

    /// What is run again and again.
    pub(crate) trait Model: Fn() + Clone + Send + Sync + 'static {}

    impl<M: Fn() + Clone + Send + Sync + 'static> Model for M {}

    /// Runs a model in `orders` random orders, and in as many with few changes between tasks.
    pub(crate) fn explore(orders: usize, model: impl Model) {
        run(RandomScheduler::new(orders), model.clone());
        run(PctScheduler::new(3, orders), model);
    }

    fn run(scheduler: impl Scheduler + 'static, model: impl Model) {
        let mut config = Config::new();
        config.stack_size = 1 << 19;
        config.max_steps = MaxSteps::FailAfter(100_000);
        Runner::new(scheduler, config).run(model);
    }

    /// Waits until no task has the value any more.
    pub(crate) async fn until_alone<T>(value: &Arc<T>) {
        while Arc::strong_count(value) > 1 {
            yield_now().await;
        }
    }
}
