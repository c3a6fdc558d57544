//! A layer around any deserializer: it refuses arrays where a struct is read, and lets a [`Watch`] see what
//! is read. Without a watch it is compiled to nothing but the refusal.

use std::fmt;

use serde::de::{
    DeserializeSeed, Deserializer, EnumAccess, Error, MapAccess, SeqAccess, Unexpected,
    VariantAccess, Visitor,
};

/// The name by which `serde_json` knows a `RawValue`.
const RAW: &str = "$serde_json::private::RawValue";

/// What a type reads at a place.
#[derive(Debug, Clone, Copy)]
pub(super) enum Seen {
    /// These members.
    Members(&'static [&'static str]),
    /// Members of any name.
    AnyMember,
    /// Items of an array.
    Items,
    /// Whatever stands there.
    Everything,
}

/// Sees what is read.
pub(super) trait Watch {
    type Below<'a>: Watch
    where
        Self: 'a;

    fn note(&mut self, seen: Seen);

    /// The watch of a member or an item.
    fn below(&mut self, place: usize) -> Self::Below<'_>;
}

impl Watch for () {
    type Below<'a> = ();

    #[inline]
    fn note(&mut self, _: Seen) {}

    #[inline]
    fn below(&mut self, _: usize) {}
}

pub(super) struct Objects<D, W> {
    inner: D,
    watch: W,
}

impl<D, W> Objects<D, W> {
    #[inline]
    pub(super) fn new(inner: D, watch: W) -> Self {
        Self { inner, watch }
    }
}

/// What reads no struct below it needs no layer.
macro_rules! pass_on {
    ($($method:ident)*) => {$(
        #[inline]
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
            self.inner.$method(visitor)
        }
    )*};
}

impl<'de, D: Deserializer<'de>, W: Watch> Deserializer<'de> for Objects<D, W> {
    type Error = D::Error;

    pass_on! {
        deserialize_bool deserialize_i8 deserialize_i16 deserialize_i32 deserialize_i64 deserialize_i128
        deserialize_u8 deserialize_u16 deserialize_u32 deserialize_u64 deserialize_u128 deserialize_f32
        deserialize_f64 deserialize_char deserialize_str deserialize_string deserialize_bytes
        deserialize_byte_buf deserialize_unit deserialize_identifier deserialize_ignored_any
    }

    fn deserialize_any<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::Everything);
        self.inner.deserialize_any(Layer::new(visitor, ()))
    }

    #[inline]
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, D::Error> {
        self.inner.deserialize_option(Layer::new(visitor, self.watch))
    }

    fn deserialize_unit_struct<V: Visitor<'de>>(
        self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.inner.deserialize_unit_struct(name, visitor)
    }

    #[inline]
    fn deserialize_newtype_struct<V: Visitor<'de>>(
        mut self,
        name: &'static str,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        if name == RAW {
            self.watch.note(Seen::Everything);
            return self.inner.deserialize_newtype_struct(name, visitor);
        }
        self.inner.deserialize_newtype_struct(name, Layer::new(visitor, self.watch))
    }

    fn deserialize_seq<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::Items);
        self.inner.deserialize_seq(Layer::new(visitor, self.watch))
    }

    fn deserialize_tuple<V: Visitor<'de>>(
        mut self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::Items);
        self.inner.deserialize_tuple(len, Layer::new(visitor, self.watch))
    }

    fn deserialize_tuple_struct<V: Visitor<'de>>(
        mut self,
        name: &'static str,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::Items);
        self.inner.deserialize_tuple_struct(name, len, Layer::new(visitor, self.watch))
    }

    fn deserialize_map<V: Visitor<'de>>(mut self, visitor: V) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::AnyMember);
        self.inner.deserialize_map(Layer::new(visitor, self.watch))
    }

    #[inline]
    fn deserialize_struct<V: Visitor<'de>>(
        mut self,
        name: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::Members(fields));
        self.inner.deserialize_struct(name, fields, Layer::of_struct(visitor, self.watch))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        mut self,
        name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, D::Error> {
        self.watch.note(Seen::Members(variants));
        self.inner.deserialize_enum(name, variants, Layer::new(visitor, self.watch))
    }

    #[inline]
    fn is_human_readable(&self) -> bool {
        self.inner.is_human_readable()
    }
}

/// The layer around a visitor, an access or a seed. `STRUCT`: only an object will do.
struct Layer<T, W, const STRUCT: bool = false> {
    inner: T,
    watch: W,
    /// Of the next member or item.
    place: usize,
}

impl<T, W> Layer<T, W> {
    #[inline]
    fn new(inner: T, watch: W) -> Self {
        Self { inner, watch, place: 0 }
    }
}

impl<T, W> Layer<T, W, true> {
    #[inline]
    fn of_struct(inner: T, watch: W) -> Self {
        Self { inner, watch, place: 0 }
    }
}

macro_rules! visit_as_it_is {
    ($($method:ident($kind:ty))*) => {$(
        #[inline]
        fn $method<E: Error>(self, value: $kind) -> Result<V::Value, E> {
            self.inner.$method(value)
        }
    )*};
}

impl<'de, V: Visitor<'de>, W: Watch, const STRUCT: bool> Visitor<'de> for Layer<V, W, STRUCT> {
    type Value = V::Value;

    fn expecting(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        if STRUCT { out.write_str("an object") } else { self.inner.expecting(out) }
    }

    visit_as_it_is! {
        visit_bool(bool) visit_i8(i8) visit_i16(i16) visit_i32(i32) visit_i64(i64) visit_i128(i128)
        visit_u8(u8) visit_u16(u16) visit_u32(u32) visit_u64(u64) visit_u128(u128) visit_f32(f32)
        visit_f64(f64) visit_char(char) visit_str(&str) visit_borrowed_str(&'de str)
        visit_string(String) visit_bytes(&[u8]) visit_borrowed_bytes(&'de [u8]) visit_byte_buf(Vec<u8>)
    }

    #[inline]
    fn visit_none<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_none()
    }

    #[inline]
    fn visit_unit<E: Error>(self) -> Result<V::Value, E> {
        self.inner.visit_unit()
    }

    #[inline]
    fn visit_some<D: Deserializer<'de>>(self, reader: D) -> Result<V::Value, D::Error> {
        self.inner.visit_some(Objects::new(reader, self.watch))
    }

    #[inline]
    fn visit_newtype_struct<D: Deserializer<'de>>(self, reader: D) -> Result<V::Value, D::Error> {
        self.inner.visit_newtype_struct(Objects::new(reader, self.watch))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<V::Value, A::Error> {
        if STRUCT {
            return Err(A::Error::invalid_type(Unexpected::Seq, &self));
        }
        self.inner.visit_seq(Layer::new(items, self.watch))
    }

    #[inline]
    fn visit_map<A: MapAccess<'de>>(self, members: A) -> Result<V::Value, A::Error> {
        self.inner.visit_map(Layer::new(members, self.watch))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.inner.visit_enum(Layer::new(variant, self.watch))
    }
}

impl<'de, A: MapAccess<'de>, W: Watch> MapAccess<'de> for Layer<A, W> {
    type Error = A::Error;

    #[inline]
    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        self.inner.next_key_seed(seed)
    }

    #[inline]
    fn next_value_seed<S: DeserializeSeed<'de>>(&mut self, seed: S) -> Result<S::Value, A::Error> {
        let below = self.watch.below(self.place);
        self.place += 1;
        self.inner.next_value_seed(Layer::new(seed, below))
    }

    #[inline]
    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

impl<'de, A: SeqAccess<'de>, W: Watch> SeqAccess<'de> for Layer<A, W> {
    type Error = A::Error;

    fn next_element_seed<S: DeserializeSeed<'de>>(
        &mut self,
        seed: S,
    ) -> Result<Option<S::Value>, A::Error> {
        let below = self.watch.below(self.place);
        self.place += 1;
        self.inner.next_element_seed(Layer::new(seed, below))
    }

    fn size_hint(&self) -> Option<usize> {
        self.inner.size_hint()
    }
}

impl<'de, S: DeserializeSeed<'de>, W: Watch> DeserializeSeed<'de> for Layer<S, W> {
    type Value = S::Value;

    #[inline]
    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<S::Value, D::Error> {
        self.inner.deserialize(Objects::new(reader, self.watch))
    }
}

impl<'de, A: EnumAccess<'de>, W: Watch> EnumAccess<'de> for Layer<A, W> {
    type Error = A::Error;
    type Variant = Layer<A::Variant, W>;

    fn variant_seed<S: DeserializeSeed<'de>>(
        self,
        seed: S,
    ) -> Result<(S::Value, Self::Variant), A::Error> {
        let (value, variant) = self.inner.variant_seed(seed)?;
        Ok((value, Layer::new(variant, self.watch)))
    }
}

impl<'de, A: VariantAccess<'de>, W: Watch> VariantAccess<'de> for Layer<A, W> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.inner.unit_variant()
    }

    fn newtype_variant_seed<S: DeserializeSeed<'de>>(
        mut self,
        seed: S,
    ) -> Result<S::Value, A::Error> {
        self.inner.newtype_variant_seed(Layer::new(seed, self.watch.below(0)))
    }

    fn tuple_variant<V: Visitor<'de>>(
        mut self,
        len: usize,
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let mut below = self.watch.below(0);
        below.note(Seen::Items);
        self.inner.tuple_variant(len, Layer::new(visitor, below))
    }

    fn struct_variant<V: Visitor<'de>>(
        mut self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        let mut below = self.watch.below(0);
        below.note(Seen::Members(fields));
        self.inner.struct_variant(fields, Layer::of_struct(visitor, below))
    }
}
