//! Tests that run on each kind of runtime: a test is a function without arguments, and stands in
//! `on_both_runtimes!`. The tests of the message path do, as its parts run at the same time only on threads.

/// Makes two tests of each function: on one thread, and with the server on four. One that is not listed is dead
/// code, which does not compile.
macro_rules! on_both_runtimes {
    ($($test:ident),+ $(,)?) => {
        mod one_thread {
            $(#[tokio::test]
            async fn $test() {
                super::$test().await;
            })+
        }
        mod four_threads {
            $(#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
            async fn $test() {
                super::$test().await;
            })+
        }
    };
}
pub(crate) use on_both_runtimes;
