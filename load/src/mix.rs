//! `--mix`: which packages are called, how often, and with what.

use anyhow::{Context as _, bail, ensure};

/// Weights beyond this would make a deck that does not fit a cache.
const MAX_WEIGHT: u32 = 10_000;

pub(crate) const ECHO: &str = "100=1";
pub(crate) const GET_AUTHORS: &str = "1=1";
pub(crate) const CREATE_AUTHOR: &str = "3=1";

/// One package of a mix.
#[derive(Debug, Clone)]
pub(crate) struct Part {
    pub(crate) package: i32,
    weight: u32,
    /// JSON; `########` stands for eight digits that no two requests share.
    pub(crate) data: String,
}

#[derive(Debug, Clone)]
pub(crate) struct Mix(Vec<Part>);

impl Mix {
    /// Reads `100=90,1=9,3=1`: packages and how often each is called.
    pub(crate) fn parse(text: &str) -> anyhow::Result<Self> {
        let part = |part: &str| {
            let (package, weight) = part.split_once('=').unwrap_or((part, "1"));
            let package: i32 = package.trim().parse().context("a package is a number")?;
            let weight: u32 = weight.trim().parse().context("a weight is a whole number")?;
            ensure!(weight > 0, "a weight is at least 1");
            let data = match package {
                3 => r#"{"name":"Author ########"}"#,
                4 => r#"{"id":1,"name":"Author ########"}"#,
                _ => "{}",
            };
            Ok(Part { package, weight, data: data.to_owned() })
        };
        let parts = text.split(',').map(part).collect::<anyhow::Result<Vec<_>>>()?;
        ensure!(parts.len() <= 100, "a mix has at most 100 packages");
        let total = parts.iter().map(|part| part.weight).sum::<u32>();
        ensure!(total <= MAX_WEIGHT, "the weights come to {total}, {MAX_WEIGHT} is the most");
        Ok(Self(parts))
    }

    /// Sets the data of packages: `100={"text":"hello"}`.
    pub(crate) fn with_data(mut self, data: &[String]) -> anyhow::Result<Self> {
        for text in data {
            let parsed = text.split_once('=').and_then(|(id, data)| Some((id.parse().ok()?, data)));
            let (package, data): (i32, _) = parsed.with_context(|| format!("{text}: PKG=JSON"))?;
            let number = data.replace("########", "00000000");
            serde_json::from_str::<serde_json::Value>(&number)
                .with_context(|| format!("{text}: the data is not JSON"))?;
            let part = self.0.iter_mut().find(|part| part.package == package);
            let Some(part) = part else { bail!("package {package} is not in the mix") };
            part.data = data.to_owned();
        }
        Ok(self)
    }

    pub(crate) fn parts(&self) -> &[Part] {
        &self.0
    }

    /// The index of each part as often as it weighs, spread evenly.
    pub(crate) fn deck(&self) -> Vec<u8> {
        let mut cards = Vec::new();
        for (index, part) in self.0.iter().enumerate() {
            let card = |nth| ((f64::from(nth) + 0.5) / f64::from(part.weight), index as u8);
            cards.extend((0..part.weight).map(card));
        }
        cards.sort_by(|one, other| one.0.total_cmp(&other.0));
        cards.into_iter().map(|(_, index)| index).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deck_has_each_package_as_often_as_it_weighs_and_spread() {
        let deck = Mix::parse("100=6,1=3,3=1").unwrap().deck();
        let count = |index| deck.iter().filter(|card| **card == index).count();
        assert_eq!([count(0), count(1), count(2)], [6, 3, 1]);
        assert_eq!(deck, [0, 1, 0, 0, 1, 2, 0, 0, 1, 0]);
    }

    #[test]
    fn what_is_no_mix_is_refused() {
        for text in ["", "echo", "100=0", "100=1.5", "100=10001"] {
            assert!(Mix::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn data_goes_to_a_package_of_the_mix_and_is_json() {
        let with = |data: &str| Mix::parse("100").unwrap().with_data(&[data.to_owned()]);
        assert_eq!(with(r#"100={"a":"b"}"#).unwrap().parts()[0].data, r#"{"a":"b"}"#);
        assert!(with("100=[########]").is_err());
        assert!(with("100={\"a\":\"########\"}").is_ok());
        for data in ["{}", "1={}", "100={"] {
            assert!(with(data).is_err(), "{data}");
        }
    }
}
