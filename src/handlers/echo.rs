//! ECHO: returns its data as it came. For tests, load tools and the curious.

use serde_json::value::RawValue;

use super::{Answer, Caller, Context, Effect, Handler, HandlerError};

pub(super) struct Echo;

impl Handler for Echo {
    type Input = Box<RawValue>;
    type Output = Box<RawValue>;
    const INPUT: &'static str = "any object";
    const OUTPUT: &'static str = "the same object";
    const EFFECT: Effect = Effect::Nothing;

    async fn handle(
        &self,
        _: &Context,
        _: &Caller,
        input: Self::Input,
    ) -> Result<Answer<Self::Output>, HandlerError> {
        Ok(input.into())
    }
}
